"""The wire to a judge: `POST /v1/chat/completions` with the standard library, against servers that fail.

Every call ends within its time-outs; every failure has a cause. The key is sent to its server, nowhere else.
"""

import functools
import http.client
import json
import random
import socket
import threading
import time
from email.utils import parsedate_to_datetime
from urllib.parse import urlsplit

from plumbing.options import BadInput

CONNECT_SECONDS = 10.0
TRIES = 4  # of one call
FIRST_WAIT = 0.5  # seconds before the second try, doubled before each further one
MAX_WAIT = 60.0  # seconds between two tries, whatever Retry-After says


class Failed(Exception):
    """A call or a reply that came to nothing. cause: one of oracle.CAUSES; str(): words on one line."""

    def __init__(self, cause: str, words: str, retry_after: float | None = None):
        super().__init__(" ".join(words.split())[:300])
        self.cause, self.retry_after = cause, retry_after


class Chat:
    """A chat-completions server: time-outs that hold, retries, a circuit breaker, a budget, and counts."""

    def __init__(
        self, url: str, key: str, timeout: float, patience: int, max_calls: int, max_tokens: int,
        option: str = "oracle",  # prefix of the options that messages name
    ):  # fmt: skip
        parts = urlsplit(url if "//" in url else f"//{url}")
        try:
            port = parts.port
        except ValueError as error:
            raise BadInput(f"--{option}_url {url}: {error}; write http://HOST:PORT/v1") from error
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise BadInput(f"--{option}_url {url}: not an address; write http://HOST:PORT/v1")
        if not key.isascii() or not key.isprintable():
            raise BadInput("ORACLE_API_KEY: holds characters that no key has; set it again")
        kind = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
        self.connect = functools.partial(kind, parts.hostname, port, timeout=CONNECT_SECONDS)
        path = parts.path.rstrip("/") or "/v1"
        self.path = path if path.endswith("/chat/completions") else path + "/chat/completions"
        self.headers = {"Content-Type": "application/json"}
        self.headers |= {"Authorization": f"Bearer {key}"} if key else {}
        self.key, self.timeout, self.max_calls, self.max_tokens = key, timeout, max_calls, max_tokens
        self.patience = patience  # tries in a row that may fail before the server counts as dead
        self.calls = self.tokens = self.in_a_row = 0
        self.last = ""  # words of the last failure
        self.lock, self.jitter = threading.Lock(), random.Random(0)

    def ask(self, request: dict, tries: int = TRIES) -> tuple[str, str]:
        """(text of the reply, its finish_reason). Failed after `tries`, or at once where none would help."""
        payload = json.dumps(request).encode()
        for i in range(tries):
            self._admit()
            try:
                answer = self._post(payload)
                break
            except Failed as failed:
                with self.lock:
                    self.in_a_row += failed.cause in ("connection", "timeout", "server")
                    self.last = str(failed)
                if failed.cause == "refused" or i == tries - 1:
                    raise
                wait = FIRST_WAIT * 2**i if failed.retry_after is None else failed.retry_after
                time.sleep(min(wait * self.jitter.uniform(1, 1.5), MAX_WAIT))
        text, reason, tokens = answer
        with self.lock:
            self.in_a_row, self.tokens = 0, self.tokens + tokens
        return text, reason

    def _admit(self):
        with self.lock:
            if self.in_a_row >= self.patience:
                raise Failed("dead", f"{self.in_a_row} tries in a row failed, the last: {self.last}")
            if 0 < self.max_calls <= self.calls or 0 < self.max_tokens <= self.tokens:
                raise Failed("budget", f"{self.calls} calls and {self.tokens} tokens are spent")
            self.calls += 1

    def _post(self, payload: bytes) -> tuple[str, str, int]:
        connection, overdue = self.connect(), threading.Event()
        watchdog = None
        try:
            connection.connect()
            # The socket's own time-out starts anew with every byte; this one ends the whole exchange
            watchdog = threading.Timer(self.timeout, _hang_up, (connection.sock, overdue))
            watchdog.daemon = True
            watchdog.start()
            connection.sock.settimeout(self.timeout)
            connection.request("POST", self.path, payload, self.headers)
            response = connection.getresponse()
            data = response.read()
        except (OSError, http.client.HTTPException) as error:
            late = overdue.is_set() or isinstance(error, TimeoutError)
            words = f"{type(error).__name__}: {error}"
            raise Failed("timeout" if late else "connection", words) from error
        finally:
            if watchdog:
                watchdog.cancel()
            connection.close()
        if overdue.is_set():
            raise Failed("timeout", f"no whole reply within {self.timeout:.0f} s")
        text = data.decode(errors="replace")
        text = text.replace(self.key, "***") if self.key else text  # some servers quote the key back
        status = response.status
        if status != 200:
            cause = "busy" if status in (408, 429) else "server" if status >= 500 else "refused"
            wait = _retry_after(response.headers.get("Retry-After", ""))
            raise Failed(cause, f"HTTP {status}: {_server_words(text)}", wait)
        try:
            answer = json.loads(text)
            choice = answer["choices"][0]
            said, reason = choice["message"]["content"], str(choice.get("finish_reason"))
            if not isinstance(said, str | None):
                raise TypeError("content is no text")
            tokens = (answer.get("usage") or {}).get("total_tokens")
        except (ValueError, RecursionError, LookupError, TypeError, AttributeError) as error:
            raise Failed("bad_reply", f"no chat completion: {text[:100]!r}") from error
        estimate = (len(payload) + len(data)) // 4  # for servers that do not count
        return said or "", reason, tokens if type(tokens) is int else estimate


def _hang_up(sock: socket.socket, overdue: threading.Event):
    overdue.set()
    try:
        sock.shutdown(socket.SHUT_RDWR)  # wakes the thread that reads from it
    except OSError:
        pass  # the other side was faster


def _retry_after(value: str) -> float | None:
    """Seconds, from a number of them or an HTTP date; None where it says neither."""
    try:
        seconds = float(value) if value.strip()[:1].isdigit() else parsedate_to_datetime(value).timestamp()
    except (ValueError, TypeError, OverflowError):
        return None
    return max(0.0, seconds if value.strip()[:1].isdigit() else seconds - time.time())


def _server_words(text: str) -> str:
    """The message inside an error reply, else its beginning."""
    try:
        error = json.loads(text)
        error = error.get("error", error.get("message", error.get("detail")))
        return str(error.get("message", error) if isinstance(error, dict) else error)
    except (ValueError, RecursionError, AttributeError):
        return text[:200] or "without a word"
