// Rocket.Chat's own client for livechat, unchanged, against the service at process.argv[2].
const assert = require("node:assert/strict");
const { default: ApiLivechat } = require("@rocket.chat/sdk/lib/api/Livechat");

const host = process.argv[2];
const quiet = { debug() {}, info() {}, warning() {}, error() {} };
const token = "a token/with é";
const field = { token, key: "address", value: "Rocket.Chat street", overwrite: true };
const city = { key: "city", value: "Tallinn", overwrite: true };

async function refused(promise, status, error) {
  await assert.rejects(promise, (result) => {
    assert.equal(result.status, status);
    assert.equal(result.data.success, false);
    assert.equal(result.data.error, error);
    return true;
  });
}

async function main() {
  const client = new ApiLivechat({ host, logger: quiet });

  const granted = await client.grantVisitor({
    visitor: { token, name: "John Doe", email: "john.doe@email.com" },
  });
  assert.equal(granted.username, "guest-2");
  assert.equal(granted.visitorEmails[0].address, "john.doe@email.com");
  assert.deepEqual((await client.visitor()).visitor, granted);
  assert.equal(await client.updateVisitorStatus("busy"), "busy");
  await client.sendCustomField(field);
  await client.sendCustomFields({ token, customFields: [city] });
  assert.deepEqual((await client.visitor()).visitor.livechatData, {
    address: "Rocket.Chat street",
    city: "Tallinn",
  });

  await refused(client.grantVisitor({ visitor: {} }), 400,
    "Match error: Missing key 'token' in field visitor");
  await refused(client.grantVisitor({ visitor: { token: " " } }), 400,
    "Token cannot be empty [error-invalid-token]");
  await refused(client.updateVisitorStatus(5), 400,
    "Match error: Expected string, got number in field status");
  await refused(client.sendCustomField({ ...field, key: 5 }), 400,
    "must be string [invalid-params]");
  await refused(client.sendCustomFields({ token, customFields: [] }), 400, "invalid-custom-field");

  const erased = await client.deleteVisitor();
  assert.equal(erased._id, granted._id);
  // Its slash makes an unknown token an unknown path.
  await refused(client.visitor(), 404, "Resource not found [error-not-found]");
  await refused(client.deleteVisitor(), 404, "Resource not found [error-not-found]");
  await refused(client.updateVisitorStatus("busy"), 400, "[invalid-token]");
  await refused(client.sendCustomField(field), 400, "invalid-token");
  await refused(client.sendCustomFields({ token, customFields: [city] }), 400, "invalid-token");
}

main().then(
  () => console.log("@rocket.chat/sdk: all calls and all refusals went as expected"),
  (error) => {
    console.error(error);
    process.exit(1);
  },
);
