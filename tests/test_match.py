"""Which visitor a registration meets (contract, 2.3), in the four forms of LIVECHAT_MATCH."""

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import storage
from app import create_app
from settings import MATCH_FORMS, Settings
from storage.visitors import random_id
from tests.service import Service

PHONE_FORMS = ["token,phone", "token,phone,email"]
EMAIL_FORMS = ["token,email", "token,phone,email"]


@pytest.mark.parametrize("form", MATCH_FORMS)
def test_the_token_comes_first(make_service, form):
    service = make_service(LIVECHAT_MATCH=form)
    ann = service.register("ann", phone="1", email="ann@example.org")
    bob = service.register("bob", phone="2", email="bob@example.org")
    met = service.register("bob", phone="1", email="ann@example.org")
    assert met["_id"] == bob["_id"] != ann["_id"]


@pytest.mark.parametrize("form", PHONE_FORMS)
def test_who_is_met_by_phone_keeps_the_old_token_which_the_answer_carries(make_service, form):
    service = make_service(LIVECHAT_MATCH=form)
    ann = service.register("ann", phone="1")
    met = service.register("new", phone="1", name="Ann")
    assert met == ann | {"name": "Ann"}
    assert service.register("new", phone="2")["_id"] != ann["_id"]


@pytest.mark.parametrize("form", EMAIL_FORMS)
def test_who_is_met_by_email_gets_the_new_token(make_service, form):
    service = make_service(LIVECHAT_MATCH=form)
    ann = service.register("old", email="ann@example.org")
    met = service.register("new", email=" ANN@example.org ")
    assert met == ann | {"token": "new"}
    assert service.register("new") == met
    assert service.register("old")["_id"] != ann["_id"]


def test_the_phone_comes_before_the_email(make_service):
    service = make_service(LIVECHAT_MATCH="token,phone,email")
    by_email = service.register("a", email="a@example.org")
    by_phone = service.register("b", phone="1")
    met = service.register("new", phone="1", email="a@example.org")
    assert met["_id"] == by_phone["_id"] != by_email["_id"]
    assert met["token"] == "b"


def test_of_several_the_oldest_is_met(make_service, tmp_path):
    service = make_service()  # which matches by token alone
    visitors = [service.register(token, phone="1", email="x@y") for token in "zya"]
    service.database.close()
    assert make_service(LIVECHAT_MATCH="token,phone").register("n", phone="1") == visitors[0]
    met = make_service(LIVECHAT_MATCH="token,email").register("n", email="x@y")
    assert met == visitors[0] | {"token": "n"}


def test_a_phone_is_matched_exactly_and_an_empty_one_never(make_service):
    service = make_service(LIVECHAT_MATCH="token,phone,email")
    ids = {
        service.register(token, phone=phone, email="")["_id"]
        for token, phone in zip("abcd", ["+1", "1", "", ""], strict=True)
    }
    assert len(ids) == 4


@pytest.mark.parametrize("form", ["token", "token,email"])
def test_a_phone_that_is_not_configured_meets_nobody(make_service, form):
    service = make_service(LIVECHAT_MATCH=form)
    assert service.register("a", phone="1")["_id"] != service.register("b", phone="1")["_id"]


def test_an_id_is_of_17_characters_that_are_all_as_likely():
    alphabet = "23456789ABCDEFGHJKLMNPQRSTWXYZabcdefghijkmnopqrstuvwxyz"
    ids = [random_id() for _ in range(20_000)]
    assert len(set(ids)) == len(ids)
    assert {len(id_) for id_ in ids} == {17}
    for position in range(17):
        assert {id_[position] for id_ in ids} == set(alphabet)
    counted = Counter("".join(ids))
    expected = 17 * len(ids) / len(alphabet)
    # Six times the standard deviation: once in ten million runs there is more by chance; a byte
    # modulo 55 would make 36 of the characters more likely by a fourth.
    for character in alphabet:
        assert abs(counted[character] - expected) < 6 * expected**0.5


class Model:
    """The contract's rules on a plain list of dicts, the oldest visitor first."""

    def __init__(self, form):
        self.form = form.split(",")
        self.visitors = []
        self.guest = 1

    def meet(self, sent, email):
        for visitor in self.visitors:
            if visitor["token"] == sent["token"]:
                return visitor
        for visitor in self.visitors:
            if "phone" in self.form and sent.get("phone") and visitor["phone"] == sent["phone"]:
                return visitor
        for visitor in self.visitors:
            if "email" in self.form and email and visitor["email"] == email:
                visitor["token"] = sent["token"]
                return visitor
        return None

    def register(self, sent, now, new_id):
        """Return the visitor of the answer, or the type of the error."""
        email = sent.get("email", "").strip().lower()
        if not sent["token"].strip():
            return "error-invalid-token"
        if sent.get("email") and not (email.count("@") == 1 and email.strip("@") == email):
            return "error-invalid-email"
        visitor = self.meet(sent, email)
        if visitor is None:
            username = sent.get("username")
            if not username:
                self.guest += 1
                username = f"guest-{self.guest}"
            visitor = {"_id": new_id, "username": username, "ts": now, "updated": now}
            visitor |= dict.fromkeys(("name", "phone", "email", "department"), "")
            visitor |= {"token": sent["token"], "fields": {}}
            self.visitors.append(visitor)
        for key in ("name", "phone", "department"):
            visitor[key] = sent.get(key) or visitor[key]
        visitor["email"] = email or visitor["email"]
        visitor["updated"] = max(visitor["updated"], now)
        for field in sent.get("customFields", []):
            if field["overwrite"] or visitor["fields"].get(field["key"], "") == "":
                visitor["fields"][field["key"]] = field["value"]
        return self.answer(visitor)

    @staticmethod
    def answer(visitor):
        answer = {"_id": visitor["_id"], "username": visitor["username"], "status": "online"}
        answer["ts"] = f"1970-01-01T00:00:00.{visitor['ts']:03}Z"
        answer["_updatedAt"] = f"1970-01-01T00:00:00.{visitor['updated']:03}Z"
        answer["token"] = visitor["token"]
        if visitor["name"]:
            answer["name"] = visitor["name"]
        if visitor["phone"]:
            answer["phone"] = [{"phoneNumber": visitor["phone"]}]
        if visitor["email"]:
            answer["visitorEmails"] = [{"address": visitor["email"]}]
        if visitor["department"]:
            answer["department"] = visitor["department"]
        if visitor["fields"]:
            answer["livechatData"] = visitor["fields"]
        return answer


REGISTRATION = st.fixed_dictionaries(
    {"token": st.sampled_from(["a", "b", "c", "d", " a", " "])},
    optional={
        "name": st.sampled_from(["", "Ann", "Bob"]),
        "phone": st.sampled_from(["", "1", "2", "3", " 1"]),
        "email": st.sampled_from(["", "x@y", " X@Y", "z@y", "no", "@", " "]),
        "department": st.sampled_from(["", "Support"]),
        "username": st.sampled_from(["", "guest-3", "kim"]),
        "customFields": st.lists(
            st.fixed_dictionaries(
                {
                    "key": st.sampled_from(["k", "k.l", "m"]),
                    "value": st.sampled_from(["", "v", "w"]),
                    "overwrite": st.booleans(),
                }
            ),
            max_size=4,
        ),
    },
)


@pytest.fixture(scope="module", params=MATCH_FORMS)
def form_and_service(request, tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "livechat.db"
    service = Service(path, {"LIVECHAT_MATCH": request.param})
    yield request.param, service
    service.database.close()


@settings(max_examples=20, deadline=None)
@given(sequence=st.lists(st.tuples(REGISTRATION, st.integers(0, 999)), min_size=1, max_size=12))
def test_the_service_agrees_with_a_plain_model_on_every_answer(form_and_service, sequence):
    form, service = form_and_service
    service.database.write(
        lambda connection: connection.execute("DELETE FROM visitor; UPDATE guest SET last = 1").get
    )
    id_of_now = []
    match = Settings.from_environ({"LIVECHAT_MATCH": form}).match
    store = storage.VisitorStore(
        service.database, match, clock=lambda: service.now, make_id=lambda: id_of_now[-1]
    )
    service.http.app = create_app(store, Settings())
    model = Model(form)
    for sent, now in sequence:
        service.now = now
        id_of_now.append(random_id())
        expected = model.register(sent, now, id_of_now[-1])
        answer = service.post({"visitor": sent})
        if isinstance(expected, str):
            assert (answer.status_int, answer.json["errorType"]) == (400, expected)
        else:
            assert answer.json == {"visitor": expected, "success": True}
            assert list(answer.json["visitor"]) == list(expected)  # in the contract's order
    assert len(service.content()[0]) == len(model.visitors)
    assert service.content()[1] == [(model.guest,)]
