"""The wire to a judge: `POST /v1/chat/completions` with the standard library, against servers that fail.

Every call ends within its time-outs, every reply is bounded, and every failure has a cause. The key is sent
to its server and nowhere else, and it is taken out of all that people are shown.
"""

import contextlib
import functools
import gzip
import html
import http.client
import io
import json
import random
import re
import socket
import threading
import time
import zlib
from email.utils import parsedate_to_datetime
from urllib.parse import quote, urlsplit

from plumbing.options import BadInput, one_line

CONNECT_SECONDS = 10.0
TRIES = 4  # of one call
FIRST_WAIT = 0.5  # seconds before the second try, doubled before each further one
MAX_WAIT = 60.0  # seconds between two tries, whatever Retry-After says
MAX_BYTES = 2**22  # of a reply
MAX_TOKENS = 2**31  # of one reply, more is no count
READ_ENCODINGS = ("", "identity", "gzip", "x-gzip", "deflate")  # others need a package
# What people paste behind /v1
ENDPOINT = re.compile(r"/+(chat/completions|completions|responses|models)?/*$")


class Failed(Exception):
    """A call or a reply that came to nothing. cause: one of oracle.CAUSES. words: uncut, on one line.
    str(): their beginning, for people."""

    def __init__(self, cause: str, words: str, retry_after: float | None = None):
        self.cause, self.words, self.retry_after = cause, one_line(words), retry_after
        super().__init__(self.words[:300])


class Chat:
    """A chat-completions server: time-outs that hold, retries, a circuit breaker, a budget, and counts.

    patience: tries in a row that may fail before the server counts as dead. max_calls, max_tokens: 0 means no
    limit. option: prefix of the options that messages name.
    """

    def __init__(
        self, url: str, key: str, timeout: float, patience: int, max_calls=0, max_tokens=0, option="oracle"
    ):
        name, wants = f"--{option}_url", "write http://HOST:PORT/v1"
        shown = name if "@" in url else f"{name} {url}"  # before an @ there may be a password
        try:
            parts = urlsplit(url.strip())
            if parts.scheme not in ("http", "https") or not parts.hostname:
                raise ValueError("not an address")
            kind = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
            port = parts.port or kind.default_port
            self.connect = functools.partial(kind, parts.hostname, port, timeout=CONNECT_SECONDS)
            self.connect()  # which connects nothing yet, but checks the host
        except (ValueError, http.client.InvalidURL) as error:
            raise BadInput(f"{shown}: {'not an address' if '@' in url else error}; {wants}") from error
        if parts.username or parts.password:
            raise BadInput(f"{name}: holds a user name or a password; the place for a key is ORACLE_API_KEY")
        if not key.isascii() or not key.isprintable():
            raise BadInput("ORACLE_API_KEY: holds characters that no key has; set it again")
        path = quote(ENDPOINT.sub("", parts.path) or "/v1", safe="/%:@") + "/chat/completions"
        self.path = path + (f"?{quote(parts.query, safe='=&%')}" if parts.query else "")
        self.headers = {"Content-Type": "application/json"}
        self.headers |= {"Authorization": f"Bearer {key}"} if key else {}
        self.key, self.timeout, self.patience = key, timeout, patience
        self.max_calls, self.max_tokens = max_calls, max_tokens
        self.calls = self.tokens = self.in_a_row = 0
        self.last = ""  # words of the last failure
        self.lock, self.jitter = threading.Lock(), random.Random(0)

    def ask(self, request: dict, tries: int = TRIES) -> tuple[str, str]:
        """(text of the reply, its finish_reason). Raises Failed after `tries`, or at once if none helps."""
        payload = json.dumps(request).encode()
        for i in range(tries):
            self._admit()
            try:
                text, reason, tokens = self._post(payload)
                with self.lock:
                    self.in_a_row, self.tokens = 0, self.tokens + tokens
                return text, reason
            except Failed as failed:
                failed = self.hidden(failed)
                with self.lock:
                    self.in_a_row += failed.cause in ("connection", "timeout", "server")
                    self.last = str(failed)
                if failed.cause == "refused" or i == tries - 1:
                    raise failed from None
                wait = failed.retry_after or FIRST_WAIT * 2**i  # no wait at all would be a busy loop
                time.sleep(min(wait * self.jitter.uniform(1, 1.5), MAX_WAIT))

    def hide(self, text: str) -> str:
        """The text without the key, which some servers quote back in the spelling of JSON, URLs or HTML."""
        return re.sub("".join(map(_spellings, self.key)), "***", text) if self.key else text

    def hidden(self, failed: Failed) -> Failed:
        """The failure in words without the key; what was added to the server's words stays."""
        status = re.match(r"HTTP \d+: |", failed.words)[0]
        return Failed(failed.cause, status + self.hide(failed.words[len(status) :]), failed.retry_after)

    def _admit(self):
        with self.lock:
            if self.in_a_row >= self.patience:
                raise Failed("dead", f"{self.in_a_row} tries in a row failed, the last: {self.last}")
            if 0 < self.max_calls <= self.calls or 0 < self.max_tokens <= self.tokens:
                raise Failed("budget", f"{self.calls} calls and {self.tokens} tokens are spent")
            self.calls += 1

    def _post(self, payload: bytes) -> tuple[str, str, int]:
        """(text, finish_reason, tokens) of one try."""
        connection, overdue, watchdog = self.connect(), threading.Event(), None
        try:
            connection.connect()
            # The socket's own time-out starts anew with every byte; this one ends the whole exchange
            watchdog = threading.Timer(self.timeout, _hang_up, (connection.sock, overdue))
            watchdog.daemon = True
            watchdog.start()
            connection.sock.settimeout(self.timeout)
            connection.request("POST", self.path, payload, self.headers)
            response = connection.getresponse()
            while 100 < response.status < 200:  # early hints; the reply comes behind them
                response.headers = None
                response.begin()
            data = response.read(MAX_BYTES + 1)
            if response.length and len(data) <= MAX_BYTES:
                raise http.client.IncompleteRead(data, response.length)
        except (OSError, http.client.HTTPException, ValueError) as error:  # the last: of a chunk's size
            late = overdue.is_set() or isinstance(error, TimeoutError)
            words = f"{type(error).__name__}: {error}"
            raise Failed("timeout" if late else "connection", words) from error
        finally:
            if watchdog:
                watchdog.cancel()
            connection.close()
        if overdue.is_set():
            raise Failed("timeout", f"no whole reply within {self.timeout:.0f} s")
        if len(data) > MAX_BYTES:
            raise Failed("bad_reply", f"a reply of more than {MAX_BYTES // 2**20} MB")
        text, status, unread = _text_of(data), response.status, ""
        packed = response.headers.get("Content-Encoding", "").lower()
        if packed not in READ_ENCODINGS and "\ufffd" in text:
            unread = f"the reply is packed as {packed}, which is not read here"
        if unread and 200 <= status < 300:
            raise Failed("refused", unread)
        if not 200 <= status < 300:
            moved = response.headers.get("Location")
            words = f"moved to {moved}" if moved else unread or _server_words(text)
            raise Failed(_cause(status, words), f"HTTP {status}: {words}", _retry_after(response.headers))
        said, reason, tokens = read_completion(text)
        estimate = (len(payload) + len(data)) // 4  # for servers that do not count
        return said, reason, tokens if type(tokens) is int and 0 <= tokens < MAX_TOKENS else estimate


def _hang_up(sock: socket.socket, overdue: threading.Event):
    overdue.set()
    with contextlib.suppress(OSError):  # the other side was faster
        sock.shutdown(socket.SHUT_RDWR)  # wakes the thread that reads from it


def _spellings(c: str) -> str:
    """A pattern for one character of the key as it stands, escaped, or as its code. No two alternatives match
    the same text, or the time would double with each character."""
    code = f"{ord(c):02x}"
    codes = rf"(?i:\\{{1,4}}u00{code}|%{code}|&#x{code};|&#{ord(c)};)"
    named = f"|{html.escape(c)}" if c in '<>&"' else ""
    return rf"(?:\\{{0,4}}{re.escape(c)}|{codes}{named})"


def _cause(status: int, words: str) -> str:
    """Whether to try again (busy, server) or not (refused). Spent credit is HTTP 429 at some servers."""
    if status in (408, 409, 425, 429) and "insufficient_quota" not in words:
        return "busy"
    return "server" if status >= 500 else "refused"


def _retry_after(headers) -> float | None:
    """Seconds, from milliseconds, a number of seconds or an HTTP date; None if the server says nothing."""
    try:
        if "retry-after-ms" in headers:
            return max(0.0, float(headers["retry-after-ms"]) / 1000)
        value = headers.get("Retry-After", "").strip()
        if value[:1].isdigit():
            return max(0.0, float(value))
        return max(0.0, parsedate_to_datetime(value).timestamp() - time.time())
    except (ValueError, TypeError, OverflowError):
        return None


# ---- what servers answer


def _text_of(data: bytes) -> str:
    """The text of a body, in any encoding of Unicode, or compressed by a proxy unasked."""
    try:
        if data[:2] == b"\x1f\x8b":
            data = gzip.GzipFile(fileobj=io.BytesIO(data)).read(MAX_BYTES)
        elif data[:2] in (b"x\x01", b"x^", b"x\x9c", b"x\xda"):  # how zlib begins, HTTP's deflate
            data = zlib.decompressobj().decompress(data, MAX_BYTES)
    except (OSError, EOFError, zlib.error):
        pass  # then it is read, and shown, as it is
    return data.decode(json.detect_encoding(data), errors="replace")


STREAM = re.compile(r"\s*(?:data|event|id|retry)?:")  # how a line of server-sent events begins


def read_completion(text: str) -> tuple[str, str, object]:
    """(what the model says, finish_reason, usage.total_tokens as it stands there) of a chat completion.

    Some servers send the content as a list of parts, of which only the texts count, or stream it although
    nobody asked for that, or answer HTTP 200 with an error inside. Where there is no text, the reason names
    what came in its place. Raises Failed for all else.
    """
    try:
        answer = _joined(text) if STREAM.match(text) else json.loads(text)
        choices = answer.get("choices")
        choice = choices[0] if choices else {}
        error, reason = answer.get("error") or choice.get("error"), str(choice.get("finish_reason")).lower()
        if error and (reason == "error" or not (choice.get("message") or {}).get("content")):
            words = _server_words(json.dumps({"error": error}, ensure_ascii=False))
            raise Failed(_cause(_status_in(error), words), f"HTTP 200 with an error: {words}")
        message = _parts(choice.get("message") or {"content": choice["text"]})  # text: of plain completions
        # Half an emoji is none
        said = message["content"].encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        usage = answer.get("usage")
    except (ValueError, RecursionError, LookupError, TypeError, AttributeError) as error:
        raise Failed("bad_reply", f"no chat completion: {text}") from error
    tokens = usage.get("total_tokens") if isinstance(usage, dict) else None
    reason = "length" if reason == "max_tokens" else reason
    if reason in ("stop", "none") and not said.strip():
        thought = "only reasoning_content" if message["reasoning"] else reason
        reason = f"refusal: {message['refusal']}" if message["refusal"] else thought
    return said, reason, tokens


def _parts(message: dict) -> dict[str, str]:
    """What a message, or a delta of a stream, says, what it refuses with, and what it thinks."""
    content, refusal = message.get("content") or "", message.get("refusal") or ""
    if isinstance(content, list):
        refusal += "".join(part["refusal"] for part in content if part.get("type") == "refusal")
        said = (part["text"] for part in content if part.get("type", "text") in ("text", "output_text"))
        content = "".join(said)
    thought = str(message.get("reasoning_content") or message.get("reasoning") or "")
    return {"content": content, "refusal": refusal, "reasoning": thought}


def _status_in(error) -> int:
    """The HTTP status that an error inside a reply stands for, by a number, a text or a type; else 400."""
    named = str([error.get(name) for name in ("code", "status", "type")]) if isinstance(error, dict) else ""
    if found := re.search(r"\b[45]\d\d\b", named):
        return int(found[0])
    return 429 if "rate_limit" in named else 503 if re.search("overloaded|server_error", named) else 400


def _joined(text: str) -> dict:
    """One completion out of the events of a stream, or the JSON that stands behind comments."""
    lines = [line.strip() for line in text.split("\n")]  # all other line ends may stand inside JSON
    events = [line[5:].strip() for line in lines if line.startswith("data:")]
    if not events:
        return json.loads("\n".join(line for line in lines if not STREAM.match(line)))
    deltas, last, usage, error = [], None, None, None
    for event in (json.loads(event) for event in events if event not in ("", "[DONE]")):
        usage, error = event.get("usage") or usage, event.get("error") or error
        for choice in event.get("choices") or []:
            delta = choice.get("delta") or choice.get("message") or {"content": choice.get("text")}
            deltas.append(_parts(delta))
            last = choice.get("finish_reason") or last
    message = {name: "".join(delta[name] for delta in deltas) for name in _parts({})}
    return {"choices": [{"message": message, "finish_reason": last}], "usage": usage, "error": error}


ERROR_NAMES = ("error", "errors", "message", "detail", "msg", "error_message")


def _server_words(text: str) -> str:
    """The message inside an error reply, in any of the known shapes, else its title or its beginning."""
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        title = re.search(r"<title>([^<]+)", text, re.IGNORECASE)
        return title[1] if title else text.strip() or "without a word"  # uncut, so that no key is halved
    more = ""
    for _ in range(5):  # {"error": {"message": ..}}, a list of that, {"detail": [{"msg": ..}]}, "error" alone
        found = found[0] if isinstance(found, list) and found else found
        names = [n for n in ERROR_NAMES if isinstance(found, dict) and found.get(n)]
        if not names:
            break
        metadata = found.get("metadata")  # of a proxy: what the server behind it said
        more = f" ({metadata['raw']})" if isinstance(metadata, dict) and metadata.get("raw") else more
        found = found[names[0]]
    return (found if isinstance(found, str) else json.dumps(found, ensure_ascii=False)) + more
