"""The environment (contract, section 8): defaults, forms, invalid values and misspelled names."""

import re

import pytest

from settings import VARIABLES, SettingError, Settings
from tests.server import ROOT


def read(**environ):
    return Settings.from_environ(environ)


@pytest.mark.parametrize(
    ("environ", "bind"),
    [
        ({}, "127.0.0.1:3000"),
        ({"PORT": "8080"}, "0.0.0.0:8080"),
        ({"LIVECHAT_HOST": "10.0.0.1"}, "10.0.0.1:3000"),
        ({"LIVECHAT_HOST": "127.0.0.1", "PORT": "8080"}, "127.0.0.1:8080"),
        ({"LIVECHAT_HOST": "::1"}, "[::1]:3000"),
        ({"LIVECHAT_HOST": "[::]", "PORT": "80"}, "[::]:80"),
        ({"LIVECHAT_HOST": "", "PORT": ""}, "127.0.0.1:3000"),
        ({"LIVECHAT_HOST": "chat.example"}, "chat.example:3000"),
        ({"PORT": "0"}, "0.0.0.0:0"),
        ({"PORT": "65535"}, "0.0.0.0:65535"),
    ],
)
def test_a_host_that_sets_port_is_reached_from_outside(environ, bind):
    assert read(**environ).bind == bind


def test_the_database_is_livechat_db_in_the_current_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert read().database == str(tmp_path / "livechat.db")
    assert read(LIVECHAT_DB="a/b.db").database == str(tmp_path / "a" / "b.db")
    assert read(LIVECHAT_DB="/x/y.db").database == "/x/y.db"


@pytest.mark.parametrize("form", ["token", "token,phone", "token,email", "token,phone,email"])
def test_the_four_forms_of_matching(form):
    assert read(LIVECHAT_MATCH=form).match == tuple(form.split(","))
    assert read(LIVECHAT_MATCH=form.replace(",", " , ")).match == tuple(form.split(","))
    assert read().match == read(LIVECHAT_MATCH="").match == ("token",)


def test_a_department_is_known_by_its_id_and_its_name():
    assert read().departments == read(LIVECHAT_DEPARTMENTS=",").departments == {}
    assert read(LIVECHAT_DEPARTMENTS="d1:Support: EU, sales, Team #1").departments == {
        "d1": "d1",
        "Support: EU": "d1",
        "sales": "sales",
        "Team #1": "Team #1",
    }


def test_custom_fields_are_a_list_of_keys():
    assert read().custom_fields == read(LIVECHAT_CUSTOM_FIELDS="").custom_fields == frozenset()
    assert read(LIVECHAT_CUSTOM_FIELDS="plan, a b,plan,").custom_fields == {"plan", "a b"}


def test_the_agent_is_split_at_the_first_colon_and_never_shown():
    assert read().agent is None
    assert read(LIVECHAT_AGENT="").agent is None
    assert read(LIVECHAT_AGENT="agent:sec:ret").agent == ("agent", "sec:ret")
    assert "sec:ret" not in repr(read(LIVECHAT_AGENT="agent:sec:ret"))


def test_origins_are_any_or_a_list():
    assert read().cors_origins == read(LIVECHAT_CORS_ORIGINS="").cors_origins == "*"
    assert read(LIVECHAT_CORS_ORIGINS="*").cors_origins == "*"
    listed = read(LIVECHAT_CORS_ORIGINS="https://Shop.example, http://[::1]:80").cors_origins
    assert listed == ("https://shop.example", "http://[::1]:80")


PATH = "it has to be the path of a file, such as /var/lib/livechat/livechat.db"
MATCH = "it has to be token | token,phone | token,email | token,phone,email"
DEPARTMENTS = "it has to be id:name,... or name,..."
AGENT = "it has to be userId:authToken"
ORIGINS = "it has to be * or origins such as https://example.org,..."
PORT = "it has to be a number from 0 to 65535"
HOST = "it has to be an IP address or a host's name, without port"
RATE = "it has to be a whole number from 1 on"
PROXIES = "it has to be a whole number from 0 on"
UNREPLACED = "begins with ~ or % or contains $, which are not replaced here"
COMMENT = "contains a comment, which would be a part of it"


@pytest.mark.parametrize(
    ("name", "value", "shown"),
    [
        ("LIVECHAT_DB", "postgres://u:secret@host/db", "'postgres://...@host/db' is a URL"),
        ("LIVECHAT_CORS_ORIGINS", "https://u:secret@a.b", "'https://...@a.b', which is no origin"),
    ],
)
def test_a_refused_url_never_shows_its_password(name, value, shown):
    with pytest.raises(SettingError) as refused:
        Settings.from_environ({name: value})
    assert shown in str(refused.value)
    assert "secret" not in str(refused.value)


@pytest.mark.parametrize(
    ("name", "value", "problem", "form"),
    [
        ("LIVECHAT_DB", "", "is empty", PATH),
        ("LIVECHAT_DB", ":memory:", "is not a file, and would be lost with the process", PATH),
        ("LIVECHAT_DB", "file:x?mode=ro", "is a URL", PATH),
        ("LIVECHAT_DB", "sqlite:///data/livechat.db", "is a URL", PATH),
        ("LIVECHAT_DB", "sqlite:livechat.db", "is a URL", PATH),
        ("LIVECHAT_DB", "~/livechat.db", UNREPLACED, PATH),
        ("LIVECHAT_DB", "$HOME/livechat.db", UNREPLACED, PATH),
        ("LIVECHAT_DB", "/home/${USER}/livechat.db", UNREPLACED, PATH),
        ("LIVECHAT_DB", "%S/livechat.db", UNREPLACED, PATH),
        ("LIVECHAT_DB", "C:\\data\\livechat.db", "is a path of Windows", PATH),
        ("LIVECHAT_DB", "C:/data/livechat.db", "is a path of Windows", PATH),
        ("LIVECHAT_DB", "data\\livechat.db", "is a path of Windows", PATH),
        ("LIVECHAT_DB", "/data/", "is a folder", PATH),
        ("LIVECHAT_DB", "/data/livechat.db #disk", COMMENT, PATH),
        ("LIVECHAT_MATCH", "phone", "is not valid", MATCH),
        ("LIVECHAT_MATCH", "token,email,phone", "is not valid", MATCH),
        ("LIVECHAT_MATCH", "Token", "is not valid", MATCH),
        ("LIVECHAT_MATCH", "a\nb", "contains a control character", MATCH),
        ("LIVECHAT_DEPARTMENTS", "c,d1:", "lacks the id or the name in 'd1:'", DEPARTMENTS),
        ("LIVECHAT_DEPARTMENTS", ":Support", "lacks the id or the name in ':Support'", DEPARTMENTS),
        ("LIVECHAT_DEPARTMENTS", "a:S,b:S", "has the id or the name of 'b:S' twice", DEPARTMENTS),
        ("LIVECHAT_DEPARTMENTS", "a:S,a:T", "has the id or the name of 'a:T' twice", DEPARTMENTS),
        (
            "LIVECHAT_CORS_ORIGINS",
            "https://a b",
            "contains 'https://a b', which is no origin",
            ORIGINS,
        ),
        (
            "LIVECHAT_CORS_ORIGINS",
            "shop.example",
            "contains 'shop.example', which is no origin",
            ORIGINS,
        ),
        (
            "LIVECHAT_CORS_ORIGINS",
            "https://a.b/",
            "contains 'https://a.b/', which is no origin",
            ORIGINS,
        ),
        ("LIVECHAT_CORS_ORIGINS", "*,https://a.b", "contains '*', which is no origin", ORIGINS),
        ("PORT", "x", "is not valid", PORT),
        ("PORT", "-1", "is not valid", PORT),
        ("PORT", "65536", "is not valid", PORT),
        ("PORT", "80.5", "is not valid", PORT),
        ("PORT", "\u0665", "is not valid", PORT),
        ("PORT", "tcp://10.0.0.1:3000", "is not valid", PORT),
        ("LIVECHAT_HOST", "localhost:3000", "is not valid", HOST),
        ("LIVECHAT_HOST", "[::1]:3000", "is not valid", HOST),
        ("LIVECHAT_HOST", "http://localhost", "is not valid", HOST),
        ("LIVECHAT_HOST", "a b", "is not valid", HOST),
        ("LIVECHAT_HOST", "*", "is not valid", HOST),
        ("LIVECHAT_RATE_LIMIT", "0", "is not valid", RATE),
        ("LIVECHAT_RATE_LIMIT", "-1", "is not valid", RATE),
        ("LIVECHAT_RATE_LIMIT", "five", "is not valid", RATE),
        ("LIVECHAT_RATE_LIMIT", "5/m", "is not valid", RATE),
        ("LIVECHAT_RATE_LIMIT", "\u0665", "is not valid", RATE),
        ("LIVECHAT_TRUSTED_PROXIES", "-1", "is not valid", PROXIES),
        ("LIVECHAT_STANDIN", "0", "is not valid", "it has to be 1 or any"),
        ("LIVECHAT_STANDIN", "true", "is not valid", "it has to be 1 or any"),
        ("LIVECHAT_TRUSTED_PROXIES", "10.0.0.1", "is not valid", PROXIES),
    ],
)
def test_an_invalid_value_is_one_line_with_the_name_the_problem_and_the_form(
    name, value, problem, form
):
    with pytest.raises(SettingError) as raised:
        read(**{name: value})
    assert str(raised.value) == f"{name}: {value!r} {problem}; {form}"
    assert len(str(raised.value).splitlines()) == 1


VALID = {
    "PORT": "8080",
    "LIVECHAT_HOST": "localhost",
    "LIVECHAT_DB": "/data/livechat.db",
    "LIVECHAT_MATCH": "token",
    "LIVECHAT_DEPARTMENTS": "d1:Support,d2:Sales",
    "LIVECHAT_CUSTOM_FIELDS": "plan,seat",
    "LIVECHAT_AGENT": "agent:S3CRET",
    "LIVECHAT_CORS_ORIGINS": "https://shop.example",
    "LIVECHAT_RATE_LIMIT": "5",
    "LIVECHAT_TRUSTED_PROXIES": "1",
    "LIVECHAT_STANDIN": "any",
}


@pytest.mark.parametrize("name", VARIABLES)
@pytest.mark.parametrize(
    ("written", "problem"),
    [
        ('"{}"', "begins or ends with a quote"),
        ("'{}'", "begins or ends with a quote"),
        ('"{}', "begins or ends with a quote"),
        ('{}"', "begins or ends with a quote"),
        (" {}", "begins or ends with a blank or a line break"),
        ("{} ", "begins or ends with a blank or a line break"),
        ("{}\t", "begins or ends with a blank or a line break"),
        ("{}\r", "begins or ends with a blank or a line break"),
        ("{}\n", "begins or ends with a blank or a line break"),
        ('"{}"\r', "begins or ends with a blank or a line break"),
        ("{} # comment", "contains a comment"),
        ("{}\t#", "contains a comment"),
        ("{}\x7f", "contains a control character"),
        ("{}\udcff", "is not UTF-8"),
    ],
)
def test_what_env_files_and_shells_leave_in_a_value_is_refused(name, written, problem):
    read(**{name: VALID[name]})
    with pytest.raises(SettingError) as raised:
        read(**{name: written.format(VALID[name])})
    assert re.match(rf"{name}: .* {problem}.*; it has to be ", str(raised.value))
    assert len(str(raised.value).splitlines()) == 1
    assert "S3CRET" not in str(raised.value)


@pytest.mark.parametrize("value", ["S3CRET", ":S3CRET", "S3CRET:"])
def test_an_agent_without_its_two_parts_is_refused_without_being_shown(value):
    with pytest.raises(SettingError) as raised:
        read(LIVECHAT_AGENT=value)
    problem = "its value lacks the colon, or what is before or after it"
    assert str(raised.value) == f"LIVECHAT_AGENT: {problem}; {AGENT}"


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("LIVECHAT_RATELIMIT", "LIVECHAT_RATE_LIMIT"),
        ("LIVECHAT_RATE_LIMITS", "LIVECHAT_RATE_LIMIT"),
        ("LIVECHAT_RATE", "LIVECHAT_RATE_LIMIT"),
        ("LIVECHAT_DEPARTMENT", "LIVECHAT_DEPARTMENTS"),
        ("LIVECHAT_CUSTOMFIELDS", "LIVECHAT_CUSTOM_FIELDS"),
        ("LIVECHAT_AGNET", "LIVECHAT_AGENT"),
        ("LIVECHAT_CORS", "LIVECHAT_CORS_ORIGINS"),
        ("LIVECHAT_TRUSTED_PROXY", "LIVECHAT_TRUSTED_PROXIES"),
        ("LIVECHAT_DB_PATH", "LIVECHAT_DB"),
        ("LIVECHAT_DATABASE", "LIVECHAT_DB"),
        ("livechat_db", "LIVECHAT_DB"),
        ("LIVECHAT_PORT", "PORT"),
        ("LIVECHAT_STANDIM", "LIVECHAT_STANDIN"),
    ],
)
def test_a_name_that_is_nearly_one_of_ours_is_refused(name, meant):
    with pytest.raises(SettingError) as raised:
        read(**{name: "S3CRET"})
    assert str(raised.value) == f"{name}: there is no such variable; did you mean {meant}?"


def test_other_unknown_names_are_told_apart_from_those_of_others():
    kubernetes = {
        "LIVECHAT_SERVICE_HOST": "10.0.0.1",
        "LIVECHAT_SERVICE_PORT": "3000",
        "LIVECHAT_SERVICE_PORT_HTTP": "3000",
        "LIVECHAT_PORT": "tcp://10.0.0.1:3000",
        "LIVECHAT_PORT_3000_TCP": "tcp://10.0.0.1:3000",
        "LIVECHAT_PORT_3000_TCP_PROTO": "tcp",
        "LIVECHAT_PORT_3000_TCP_PORT": "3000",
        "LIVECHAT_PORT_3000_TCP_ADDR": "10.0.0.1",
        "LIVECHAT_DB_SERVICE_HOST": "10.0.0.2",  # of a Service livechat-db
        "LIVECHAT_DB_PORT": "tcp://10.0.0.2:5432",
        "LIVECHAT_DB_PORT_5432_TCP_ADDR": "10.0.0.2",
    }
    ours = {"LIVECHAT_STANDIN_HOME": "/x", "HOME": "/", "XLIVECHAT_DB": ""}
    assert read(**kubernetes, **ours) == read()
    assert read(LIVECHAT_LOG_LEVEL="S3CRET", LIVECHAT_COLOR="").unknown == (
        "LIVECHAT_COLOR",
        "LIVECHAT_LOG_LEVEL",
    )
    # Beside LIVECHAT_DB it is something else.
    assert read(LIVECHAT_DB="/x.db", LIVECHAT_DB_BACKUP="/y").unknown == ("LIVECHAT_DB_BACKUP",)


def test_what_is_configured_is_said_without_a_secret():
    assert read().configured == read(PORT="", LIVECHAT_AGENT="").configured == ()
    configured = read(**VALID).configured
    shown = VALID | {"LIVECHAT_AGENT": "(not shown)"}
    assert configured == tuple(f"{name}={value}" for name, value in shown.items())


@pytest.mark.parametrize("document", ["README.md", "docs/contract.md"])
def test_every_setting_is_in_the_documents_table(document):
    table = (ROOT / document).read_text().partition("Configuration")[2].partition("\n## ")[0]
    assert set(re.findall(r"^\| `(\w+)`", table, re.MULTILINE)) - {"WEB_CONCURRENCY"} == set(
        VARIABLES
    )


def test_the_rate_limit_and_the_proxies_are_numbers():
    assert (read().rate_limit, read().trusted_proxies) == (None, 0)
    assert read(LIVECHAT_RATE_LIMIT="", LIVECHAT_TRUSTED_PROXIES="") == read()
    settings = read(LIVECHAT_RATE_LIMIT="5", LIVECHAT_TRUSTED_PROXIES="0")
    assert (settings.rate_limit, settings.trusted_proxies) == (5, 0)
    assert read(LIVECHAT_TRUSTED_PROXIES="2").trusted_proxies == 2
