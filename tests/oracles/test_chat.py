"""Addresses, replies and errors as OpenAI-compatible servers and their proxies are known to give them."""

import gzip
import html
import json
import time
import zlib
from urllib.parse import quote

import pytest
from test_judge import make, patient, perfect, question

from oracles import chat, judge
from oracles.chat import Chat, Failed, read_completion
from oracles.judge import LLMOracle
from oracles.remedies import remedy_of
from plumbing.options import BadInput

GROUP = ["1 a", "2 b"]


def client(url, key="", **options):
    return Chat(url, key, **({"timeout": 5.0, "patience": 9, "max_calls": 0, "max_tokens": 0} | options))


# ---- addresses


@pytest.mark.parametrize(
    ("url", "host", "port", "path"),
    [
        ("http://h:8000", "h", 8000, "/v1/chat/completions"),
        (" http://h:8000/v1/ ", "h", 8000, "/v1/chat/completions"),
        ("https://h/api/v1/chat/completions", "h", 443, "/api/v1/chat/completions"),
        ("http://h/v1/models", "h", 80, "/v1/chat/completions"),
        ("http://h/v1/chat/completions//", "h", 80, "/v1/chat/completions"),
        ("http://[::1]/v1", "::1", 80, "/v1/chat/completions"),
        ("https://[2001:db8::1]:8443/v1", "2001:db8::1", 8443, "/v1/chat/completions"),
        ("https://h/openai/deployments/d?api-version=1", "h", 443,
         "/openai/deployments/d/chat/completions?api-version=1"),
        ("http://h/my server/v1", "h", 80, "/my%20server/v1/chat/completions"),
    ],
)  # fmt: skip
def test_an_address_is_read_as_people_write_it(url, host, port, path):
    server = client(url)
    connection = server.connect()
    assert (connection.host, connection.port, server.path) == (host, port, path)


@pytest.mark.parametrize(
    "url",
    ["localhost", "localhost:8000/v1", "127.0.0.1:8000", "ftp://h:80/v1", "http://", "http://[::1", "http://h:x",
     "http://h:99999", "http:/h/v1", "", "http://exa mple/v1", "http://h\0x/v1"],
)  # fmt: skip
def test_what_is_no_address_is_one_line(url):
    with pytest.raises(BadInput, match="--oracle_url .*write http://HOST:PORT/v1"):
        client(url)


@pytest.mark.parametrize(
    ("url", "words"),
    [("http://me:pa55@h/v1", "ORACLE_API_KEY"), ("http://me:pa55@ex ample/v1", "not an address"),
     ("http://me:pa55/w@h/v1", "not an address"), ("me:pa55@h/v1", "not an address")],
)  # fmt: skip
def test_a_password_in_an_address_is_refused_and_not_repeated(url, words):
    with pytest.raises(BadInput, match=words) as error:
        client(url)
    assert "pa55" not in str(error.value)


# ---- replies


def completion(message, reason="stop", **more) -> dict:
    return {"choices": [{"message": message, "finish_reason": reason}], "usage": {"total_tokens": 7}} | more


def event(choice, **more) -> str:
    return f"data: {json.dumps({'choices': [choice]} | more, ensure_ascii=False)}\n\n"


def streamed(*parts) -> str:
    events = [{"choices": [{"delta": {"content": part}}]} for part in parts]
    events.append({"choices": [{"delta": {}, "finish_reason": "stop"}], "usage": {"total_tokens": 7}})
    lines = "".join(f"data: {json.dumps(event)}\n\n" for event in events)
    return f": keep-alive\n\n{lines}data: [DONE]\n\n"


THINKING = [
    {"type": "thinking", "thinking": [{"type": "text", "text": "hm"}]},
    {"type": "text", "text": "G > H"},
]


@pytest.mark.parametrize(
    ("answer", "found"),
    [
        (completion({"content": "G > H"}), ("G > H", "stop", 7)),
        (completion({"content": THINKING}), ("G > H", "stop", 7)),
        (completion({"content": None, "reasoning_content": "so"}, "length"), ("", "length", 7)),
        (completion({"role": "assistant"}, "MAX_TOKENS"), ("", "length", 7)),
        (completion({"content": None, "refusal": "no"}), ("", "refusal: no", 7)),
        (completion({"content": [{"type": "refusal", "refusal": "no"}]}), ("", "refusal: no", 7)),
        (completion({"content": ""}, "content_filter"), ("", "content_filter", 7)),
        (completion({"content": None, "tool_calls": [{}]}, "tool_calls"), ("", "tool_calls", 7)),
        (completion({"content": None, "reasoning": "so"}), ("", "only reasoning_content", 7)),
        (completion({"content": [{"text": "G > H"}]}), ("G > H", "stop", 7)),
        (completion({"content": "x"}, None, usage=None), ("x", "none", None)),
        (completion({"content": "x"}, usage=[1]), ("x", "stop", None)),
        (completion({"content": "x"}, error=None), ("x", "stop", 7)),
        ({"choices": [{"text": "G > H", "finish_reason": "stop"}]}, ("G > H", "stop", None)),
        ("\n\n \n" + json.dumps(completion({"content": "x"})), ("x", "stop", 7)),  # blank lines keep it alive
        (streamed("G ", "> H"), ("G > H", "stop", 7)),
        ("event: message\nid: 1\r\n" + event({"delta": {"content": "G"}}), ("G", "none", None)),
        (event({"delta": {"content": "a\u2028b\u2029c\x85d"}}), ("a\u2028b\u2029c\x85d", "none", None)),
        (event({"delta": {"content": [{"type": "text", "text": "G"}]}}), ("G", "none", None)),
        (event({"text": "G "}) + event({"text": "> H"}), ("G > H", "none", None)),
        (event({"delta": {"refusal": "n"}}) + event({"delta": {"refusal": "o"}}), ("", "refusal: no", None)),
        (event({"delta": {"reasoning_content": "so"}}), ("", "only reasoning_content", None)),
        (f": busy\n\n{json.dumps(completion({'content': 'x'}), indent=1)}", ("x", "stop", 7)),
        ('{"choices": [{"message": {"content": "nice \\ud83d"}}]}', ("nice \ufffd", "none", None)),
        ('{"choices": [{"message": {"content": "nice \\ud83d\\ude00"}}]}', ("nice \U0001f600", "none", None)),
    ],
)
def test_a_completion_is_read_in_every_known_shape(answer, found):
    assert read_completion(answer if isinstance(answer, str) else json.dumps(answer)) == found


@pytest.mark.parametrize(
    ("answer", "cause", "words"),
    [
        ({"error": {"message": "Provider error", "code": 502, "metadata": {"raw": "full"}}}, "server",
         "Provider error (full)"),
        ({"error": {"message": "slow down", "code": 429}}, "busy", "slow down"),
        ({"error": {"message": "slow down", "code": "429"}}, "busy", "slow down"),
        ({"error": {"message": "slow down", "type": "rate_limit_error"}}, "busy", "slow down"),
        ({"error": {"message": "gone", "code": "502"}}, "server", "gone"),
        ({"error": {"message": "gone", "status": 503}}, "server", "gone"),
        ({"error": {"message": "gone", "type": "overloaded_error", "code": None}}, "server", "gone"),
        (event({"delta": {"content": "G"}, "finish_reason": "error"}, error={"code": 502, "message": "gone"}),
         "server", "gone"),
        (": busy\n\n", "bad_reply", "busy"),
        ({"error": "Unexpected endpoint or method."}, "refused", "Unexpected endpoint"),
        ({"choices": [{"error": {"code": 503, "message": "gone"}, "message": {}}]}, "server", "gone"),
        ('data: {"error": {"message": "no thinking"}}\n\n', "refused", "no thinking"),
        ({"choices": []}, "bad_reply", "no chat completion"), ({"choices": None}, "bad_reply", ""),
        ([], "bad_reply", ""), ("", "bad_reply", ""), ("<html>busy</html>", "bad_reply", "busy"),
        ("[" * 100_000, "bad_reply", ""), (completion({"content": 7}), "bad_reply", ""),
        (completion("G"), "bad_reply", ""), ({"message": {"content": "G"}}, "bad_reply", ""),
    ],
)  # fmt: skip
def test_anything_else_in_its_place_is_a_typed_failure(answer, cause, words):
    with pytest.raises(Failed) as failed:
        read_completion(answer if isinstance(answer, str) else json.dumps(answer))
    assert failed.value.cause == cause and words in str(failed.value) and len(str(failed.value)) <= 300


@pytest.mark.parametrize(
    ("status", "body", "cause", "words"),
    [
        (400, {"object": "error", "message": "too long", "code": 400}, "refused", "HTTP 400: too long"),
        (400, [{"error": {"code": 400, "message": "bad argument"}}], "refused", "HTTP 400: bad argument"),
        (422, {"detail": [{"loc": ["body"], "msg": "field required"}]}, "refused", "field required"),
        (404, {"detail": "Not Found"}, "refused", "HTTP 404: Not Found"),
        (400, {"success": False, "errors": [{"message": "no route"}]}, "refused", "HTTP 400: no route"),
        (409, {"error": {"message": "again"}}, "busy", "HTTP 409: again"),
        (429, {"error": {"message": "no credit", "code": "insufficient_quota"}}, "busy", "no credit"),
        (429, {"error": {"message": "insufficient_quota"}}, "refused", "HTTP 429: insufficient_quota"),
        (502, "<html><head><title>502 Bad Gateway</title></head>", "server", "HTTP 502: 502 Bad Gateway"),
        (500, "", "server", "HTTP 500: without a word"), (529, {"error": {}}, "server", "HTTP 529"),
        (400, "\x1b[2Jno\nway", "refused", "HTTP 400: \ufffd[2Jno way"),
    ],
)  # fmt: skip
def test_an_error_is_put_in_the_servers_words(serve, monkeypatch, status, body, cause, words):
    body = body if isinstance(body, str) else json.dumps(body)
    server = serve(lambda request: (status, {}, body, 0))
    with pytest.raises(Failed) as failed:
        client(server.url).ask({}, tries=1)
    assert failed.value.cause == cause and words in str(failed.value)


def test_a_reply_is_bounded_may_be_compressed_and_its_count_is_no_weapon(serve, monkeypatch):
    monkeypatch.setattr(chat, "MAX_BYTES", 10_000)
    server = serve(lambda request: (200, {}, "x" * 20_000, 0))
    with pytest.raises(Failed, match="a reply of more than") as failed:
        client(server.url).ask({}, tries=1)
    assert failed.value.cause == "bad_reply"
    for tokens in (-(10**9), 10**400, "7", True, 1.5):
        answer = json.dumps(completion({"content": "x"}, usage={"total_tokens": tokens}))
        server.brain = lambda request, answer=answer: (200, {}, answer, 0)
        asked = client(server.url)
        assert asked.ask({}, tries=1) == ("x", "stop") and 0 < asked.tokens < 1000
    server.brain = lambda request: (200, {"Transfer-Encoding": "chunked"}, "-5\r\nabcde\r\n0\r\n\r\n", 0)
    with pytest.raises(Failed, match="ValueError") as failed:
        client(server.url).ask({}, tries=1)
    assert failed.value.cause == "connection"
    for damaged in (b"\x1f\x8bnothing packed", b"x^nothing packed"):
        assert chat._text_of(damaged).endswith("nothing packed")


@pytest.mark.parametrize("pack", [gzip.compress, zlib.compress])
def test_a_packed_reply_is_read_and_what_swells_is_bounded(monkeypatch, pack):
    monkeypatch.setattr(chat, "MAX_BYTES", 10_000)
    packed = pack(b"half ") + (pack(b"half") if pack is gzip.compress else b"")  # gzip may have members
    assert chat._text_of(packed) == ("half half" if pack is gzip.compress else "half ")
    assert len(chat._text_of(pack(b"x" * 10**6))) == 10_000


@pytest.mark.parametrize(
    ("packed", "data"), [("br", b"\x0b\x00\x80a\x03"), ("zstd", b"\x28\xb5\x2f\xfd\x04\x00\x09\x00\x00a")]
)
def test_a_reply_packed_in_a_way_that_is_not_read_is_one_line_with_the_remedy(serve, packed, data):
    server = serve(lambda request: (200, {"Content-Encoding": packed}, data, 0))
    with pytest.raises(BadInput, match=f"--oracle_url .*is packed as {packed}, .*; turn off its compression"):
        make(server).check()
    note = make(server).rank([question(0)], [GROUP]).notes[0]
    assert note.startswith("refused: ") and "compression" in remedy_of(note) and len(server.requests) == 2
    server.brain = lambda request: (503, {"Content-Encoding": packed}, data, 0)
    with pytest.raises(Failed, match=f"HTTP 503: the reply is packed as {packed}") as failed:
        client(server.url).ask({}, tries=1)
    assert failed.value.cause == "server"
    answer = json.dumps(completion({"content": "G > H"}))  # and one that only says so is read
    server.brain = lambda request: (200, {"Content-Encoding": packed}, answer, 0)
    assert client(server.url).ask({}, tries=1) == ("G > H", "stop")


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32-le"])
def test_a_reply_is_read_in_every_encoding_of_unicode(encoding):
    assert chat._text_of('{"a": "é"}'.encode(encoding)) == '{"a": "é"}'


def test_early_hints_stand_before_the_reply_and_are_not_it(serve):
    server = serve(perfect)
    server.early = (102, 103)
    assert make(server).rank([question(0)], [GROUP]).ranks.tolist() == [[1, 0]]


# ---- what is wrong, and what helps


@pytest.mark.parametrize(
    ("status", "words", "remedy"),
    [
        (400, "Unsupported parameter: 'max_tokens' is not supported with this model. Use"
         " 'max_completion_tokens' instead.", """{"max_tokens": null, "max_completion_tokens": 1024}'"""),
        (400, "Unsupported value: 'temperature' does not support 0 with this model. Only the default (1)",
         """--oracle_body '{"temperature": null}'"""),
        (400, "System role not supported", "whose chat template takes a system message"),
        (400, "Conversation roles must alternate user/assistant", "chat template"),
        (400, "This model's maximum context length is 2048 tokens.", "longer context"),
        (400, "m is not a valid model ID", "name a model that it serves"),
        (400, "Model Not Exist", "name a model that it serves"),
        (404, "model 'm' not found", "name a model that it serves"),
        (404, "File Not Found", "--oracle_url http"), (405, "Method Not Allowed", "mostly http://HOST:PORT/v1"),
        (400, "The plain HTTP request was sent to HTTPS port", "https://"),
        (402, "Insufficient credits", "no credit"), (403, "forbidden", "ORACLE_API_KEY is not set"),
        (400, "extra fields not permitted", "--oracle_body adds fields"),
        (407, "a password is needed", "name another address"), (451, "blocked", "name another address"),
        (413, "too much", "show fewer pictures"), (400, "The content management policy says no", "declines"),
    ],
)  # fmt: skip
def test_a_first_call_that_is_refused_names_the_option_that_helps(serve, status, words, remedy):
    body = json.dumps({"error": {"message": words}})
    with pytest.raises(BadInput) as error:
        make(serve(lambda request: (status, {}, body, 0))).check()
    assert remedy in str(error.value) and words[:20] in str(error.value) and "\n" not in str(error.value)


def test_a_server_that_has_moved_or_answers_with_an_error_inside_is_said_to(serve):
    for reply, words in (
        ((301, {"Location": "https://h/v1"}, "", 0), "moved to https://h/v1; write that address"),
        (
            (200, {}, '{"error": "Unexpected endpoint or method. (POST /api)"}', 0),
            "write the address with its",
        ),
    ):
        server = serve(lambda request, reply=reply: reply)
        with pytest.raises(BadInput, match=words):
            make(server).check()
        assert len(server.requests) == 1  # the key goes nowhere else


def test_a_server_that_is_still_loading_is_waited_for(serve, monkeypatch, capsys):
    monkeypatch.setattr(judge, "LOADING_WAIT", 0.01)
    server = serve(lambda body: (503, {}, '{"error": {"message": "Loading model"}}', 0))
    with pytest.raises(BadInput, match="HTTP 503: Loading model"):
        make(server, patience=0.05).check()
    server.brain = lambda body: perfect(body) if len(server.requests) > 30 else (503, {}, "Loading model", 0)
    oracle = make(server, concurrency=1, max_calls=2)
    oracle.check()
    assert "is not ready (HTTP 503: Loading model); waiting 600 s at most" in capsys.readouterr().out
    assert oracle.rank([question(0)], [GROUP]).ok.all()  # waiting took nothing from the budget
    drops = [1, 1]
    server.brain = lambda body: ("drop", {}, "", 0) if drops and drops.pop() else perfect(body)
    make(server).check()  # a connection cut without a word is tried again
    assert not drops and "is not ready" not in capsys.readouterr().out
    starting = [(503, {}, "Loading model", 0), ("drop", {}, "", 0)]  # the last comes first
    server.brain = lambda body: starting.pop() if starting else perfect(body)
    make(server).check()
    assert "is not ready (HTTP 503: Loading model)" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("status", "headers"), [(503, {"Retry-After": "0"}), (429, {"retry-after-ms": "-1"})]
)
def test_a_server_that_asks_for_no_wait_is_not_called_in_a_busy_loop(serve, monkeypatch, status, headers):
    waits, left = [], [1] * 3
    monkeypatch.setattr(chat.time, "sleep", waits.append)
    server = serve(lambda body: (status, headers, "", 0) if left and left.pop() else perfect(body))
    make(server).check()
    assert waits == [judge.LOADING_WAIT] * 3
    left.append(1)
    assert make(server).rank([question(0)], [GROUP]).ok.all() and waits[3] >= chat.FIRST_WAIT


@pytest.mark.parametrize(
    ("message", "reason", "words", "remedy"),
    [
        ({"refusal": "I cannot"}, "stop", "refusal: I cannot", "name another"),
        ({"content": '{"ranking"'}, "content_filter", "content_filter", "name another"),
        ({"tool_calls": [{}]}, "tool_calls", "tool_calls", "tool calls off"),
        ({"reasoning_content": "{}"}, "stop", "only reasoning_content", "reasoning parser off"),
        ({"content": " "}, "stop", "stop", "force JSON"),
    ],
)
def test_a_reply_without_an_answer_is_told_with_the_servers_reason(serve, message, reason, words, remedy):
    answer = json.dumps(completion(message, reason))
    server = serve(lambda body: (200, {}, answer, 0))
    with pytest.raises(BadInput) as error:
        patient(make(server)).rank([question(0)], [GROUP])
    assert f"empty: no answer ({words}" in str(error.value) and remedy in str(error.value)
    assert len(server.requests) == 2  # the fault was quoted back once


@pytest.mark.parametrize(
    ("note", "remedy"),
    [
        ("refused: HTTP 401: expired", "ORACLE_API_KEY"), ("refused: HTTP 402: x", "no credit"),
        ("refused: HTTP 400: odd", "--judge_body adds fields"), ("server: HTTP 502: model not found", "look"),
        ("not_json: endpoint not found", "--judge_body '"),
    ],
)  # fmt: skip
def test_a_failure_in_training_has_the_remedy_that_its_server_words_ask_for(note, remedy):
    assert remedy in remedy_of(note, "judge")


SPELLINGS = {
    "JSON": lambda key: json.dumps(key)[1:-1].replace("/", "\\/").replace("+", "\\u002B"),
    "JSON in JSON": lambda key: json.dumps(json.dumps(key)[1:-1])[1:-1],
    "an address": lambda key: quote(key, safe=""),
    "HTML": lambda key: html.escape(key).replace("+", "&#43;"),
    "beyond the cut": lambda key: f"<title>{'x' * 275}{key}</title>",
}


@pytest.mark.parametrize("spelling", SPELLINGS)
@pytest.mark.parametrize("status", [200, 400])
def test_no_spelling_of_the_key_is_shown(serve, spelling, status):
    key = "sk-ab+cd/ef=\"gh\\ij&'kl"
    server = serve(lambda body: (status, {}, SPELLINGS[spelling](key), 0))
    with pytest.raises(Failed) as failed:
        client(server.url, key).ask({}, tries=1)
    assert "***" in failed.value.words
    assert not any(part in failed.value.words for part in ("sk-", "cd", "gh", "kl"))
    server.brain = lambda body: (307, {"Location": f"http://h/?key={quote(key)}"}, "", 0)
    with pytest.raises(Failed, match=r"moved to http://h/\?key=\*\*\*$"):
        client(server.url, key).ask({}, tries=1)


def test_taking_the_key_out_takes_time_in_proportion_to_the_text():
    server, began = client("http://h", "k" * 30), time.process_time()
    assert server.hide("k" * 29 + "x") == "k" * 29 + "x"
    assert time.process_time() - began < 1


@pytest.mark.parametrize("key", ["0", "1", "null", "G", "sk-se/cret"])
def test_the_key_is_taken_out_of_what_people_see_and_never_out_of_what_is_read(serve, tmp_path, key):
    server = serve(perfect)
    oracle = LLMOracle(url=server.url, model="m", key=key, cache=str(tmp_path / "c.sqlite"))
    assert oracle.rank([question(0)], [GROUP]).ranks.tolist() == [[1, 0]]
    for says in (f"your key {key} is", json.dumps({"x": f"key {key}"}).replace("/", "\\/")):
        server.brain = lambda body, says=says: (401, {}, says, 0)
        note = oracle.rank([question(1)], [GROUP]).notes[0]
        assert "***" in note and note.startswith("refused: HTTP 401: ")
        server.brain = lambda body, says=says: says  # as the judge's own reply
        note = oracle.rank([question(2)], [GROUP]).notes[0]
        assert "***" in note and (len(key) < 5 or key not in note and key.replace("/", "\\/") not in note)
    if len(key) > 5:
        oracle.rankings.db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        assert not any(b"se/cret" in path.read_bytes() for path in tmp_path.iterdir())
