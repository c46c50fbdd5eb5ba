"""The environment (contract, section 8): defaults, forms, and values that cannot be meant."""

import pytest

from settings import SettingError, Settings


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
    assert read().departments == read(LIVECHAT_DEPARTMENTS=" , ").departments == {}
    assert read(LIVECHAT_DEPARTMENTS="d1:Support: EU, sales").departments == {
        "d1": "d1",
        "Support: EU": "d1",
        "sales": "sales",
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


@pytest.mark.parametrize(
    ("environ", "reason"),
    [
        ({"LIVECHAT_DB": ""}, "LIVECHAT_DB: the name is empty"),
        ({"LIVECHAT_DB": " "}, "LIVECHAT_DB: the name is empty"),
        ({"LIVECHAT_DB": ":memory:"}, "LIVECHAT_DB: ':memory:' is not a file"),
        ({"LIVECHAT_DB": "file:x?mode=ro"}, "LIVECHAT_DB: 'file:x?mode=ro' is not a file"),
        ({"LIVECHAT_MATCH": "phone"}, "LIVECHAT_MATCH: 'phone' is none of token |"),
        ({"LIVECHAT_MATCH": "token,email,phone"}, "LIVECHAT_MATCH: 'token,email,phone' is none"),
        ({"LIVECHAT_MATCH": "Token"}, "LIVECHAT_MATCH: 'Token' is none of"),
        ({"LIVECHAT_MATCH": "a\nb"}, "LIVECHAT_MATCH: 'a\\nb' is none of"),
        ({"LIVECHAT_DEPARTMENTS": "d1:"}, "LIVECHAT_DEPARTMENTS: 'd1:' is not id:name"),
        ({"LIVECHAT_DEPARTMENTS": ":Support"}, "LIVECHAT_DEPARTMENTS: ':Support' is not id:name"),
        ({"LIVECHAT_DEPARTMENTS": "a:S,b:S"}, "LIVECHAT_DEPARTMENTS: 'b:S' stands there twice"),
        ({"LIVECHAT_DEPARTMENTS": "a:S,a:T"}, "LIVECHAT_DEPARTMENTS: 'a:T' stands there twice"),
        ({"LIVECHAT_AGENT": "secret"}, "LIVECHAT_AGENT: not userId:authToken, both not empty"),
        ({"LIVECHAT_AGENT": ":secret"}, "LIVECHAT_AGENT: not userId:authToken, both not empty"),
        ({"LIVECHAT_AGENT": "secret:"}, "LIVECHAT_AGENT: not userId:authToken, both not empty"),
        ({"LIVECHAT_DB": "\udcff"}, "LIVECHAT_DB: not UTF-8"),
        ({"LIVECHAT_DEPARTMENTS": "\udcff:Support"}, "LIVECHAT_DEPARTMENTS: not UTF-8"),
        ({"LIVECHAT_AGENT": "secret:\udcff"}, "LIVECHAT_AGENT: not UTF-8"),
        ({"LIVECHAT_CORS_ORIGINS": "https://a b"}, "LIVECHAT_CORS_ORIGINS: 'https://a b' is no"),
        ({"LIVECHAT_CORS_ORIGINS": "shop.example"}, "LIVECHAT_CORS_ORIGINS: 'shop.example' is no"),
        ({"LIVECHAT_CORS_ORIGINS": "https://a.example/"}, "LIVECHAT_CORS_ORIGINS: 'https://a.exa"),
        ({"LIVECHAT_CORS_ORIGINS": "*,https://a.example"}, "LIVECHAT_CORS_ORIGINS: '*' is no"),
    ],
)
def test_a_value_that_cannot_be_meant_is_named_in_one_line(environ, reason):
    with pytest.raises(SettingError) as raised:
        read(**environ)
    assert str(raised.value).startswith(reason)
    assert "\n" not in str(raised.value)
    assert "secret" not in str(raised.value)


def test_the_rate_limit_and_the_proxies_are_numbers():
    assert (read().rate_limit, read().trusted_proxies) == (None, 0)
    assert read(LIVECHAT_RATE_LIMIT="", LIVECHAT_TRUSTED_PROXIES="") == read()
    settings = read(LIVECHAT_RATE_LIMIT=" 5 ", LIVECHAT_TRUSTED_PROXIES="0")
    assert (settings.rate_limit, settings.trusted_proxies) == (5, 0)
    assert read(LIVECHAT_TRUSTED_PROXIES="2").trusted_proxies == 2


@pytest.mark.parametrize(
    ("name", "value", "least"),
    [
        ("LIVECHAT_RATE_LIMIT", "0", 1),
        ("LIVECHAT_RATE_LIMIT", "-1", 1),
        ("LIVECHAT_RATE_LIMIT", "five", 1),
        ("LIVECHAT_RATE_LIMIT", "5/m", 1),
        ("LIVECHAT_RATE_LIMIT", "\u0665", 1),
        ("LIVECHAT_TRUSTED_PROXIES", "-1", 0),
        ("LIVECHAT_TRUSTED_PROXIES", "10.0.0.1", 0),
    ],
)
def test_what_is_no_such_number_is_refused(name, value, least):
    with pytest.raises(SettingError) as raised:
        read(**{name: value})
    assert str(raised.value) == f"{name}: {value!r} is not a number from {least} on"
