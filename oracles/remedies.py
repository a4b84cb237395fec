"""What helps where a judge fails, by the words of its server: one line for the user."""

import json
import re

# What helps where a judge's server refuses: pattern of its words, option, remedy. The first that fits counts
REFUSALS = (
    (r"packed as", "url", "turn off its compression, or that of the proxy before it"),
    (r"insufficient_quota|HTTP 402", "url", "the account there has no credit left; name another server"),
    (r"content.(filter|management)|inappropriate|flagged", "model", "the judge declines; name another"),
    (r"(context|prompt)\b.*(length|size|window|long)", "model", "serve it with a longer context"),
    (r"\brole|alternate", "model", "name a model whose chat template takes a system message"),
    (r"model.*(not|n't) (be )?(exist|found|available|served|a valid)|model.*(does|did) not|"
     r"(invalid|unknown|no such|not a valid) model", "model", "name a model that it serves"),
    (r"moved to", "url", "write that address"),
    (r"HTTPS port|WRONG_VERSION_NUMBER", "url", "write http:// or https://, as the server speaks it"),
    (r"CERTIFICATE_VERIFY", "url", "let the environment variable SSL_CERT_FILE name its certificate"),
    (r"HTTP 40[13]", "url", "set the environment variable ORACLE_API_KEY to a key that it accepts"),
    (r"HTTP (304|407|451)", "url", "a proxy stands before the server; name another address or server"),
    (r"HTTP 413", "frames", "show fewer pictures, or let the server take larger requests"),
    (r"HTTP 40[45]|endpoint|not found", "url", "write the address with its path, mostly http://HOST:PORT/v1"),
)  # fmt: skip
# What helps where a ranking failed, by the beginning of its note, "cause: words"
REMEDIES = {
    "function": "mend the function",
    "cut": "give the judge more room, as with --oracle_body '{\"max_tokens\": 4096}'",
    "refused": "--oracle_body adds fields to the request, or takes them out (null)",
    r"empty: no answer \((refusal|content_filter)": "the judge declines; name another",
    r"empty: no answer \(tool_calls": "turn the server's tool calls off",
    r"empty: no answer \(only": "turn the server's reasoning parser off, or raise max_tokens (--oracle_body)",
    "empty|not_json|missing|duplicate|unknown": "take a larger judge, or force JSON:"
    ' --oracle_body \'{"response_format": {"type": "json_object"}}\'',
}


def remedy_of(note: str, option: str = "oracle") -> str:
    """The remedy for a failed ranking's note; else its judge's server is to be looked at. option: prefix of
    the judge's options."""
    refused = note.startswith("refused")
    found = [words for pattern, _, words in REFUSALS if refused and re.search(pattern, note, re.IGNORECASE)]
    found += [words for pattern, words in REMEDIES.items() if re.match(pattern, note)]
    return [*found, "look at the judge's server"][0].replace("--oracle_", f"--{option}_")


def first_call_failed(judge, failed, pictures: bool) -> str:
    """One line about a judge's first call that failed: the option, the server's words, the remedy. judge: an
    LLMOracle, failed: a chat.Failed; pictures: whether the call showed one."""
    words, option = str(failed), f"--{judge.option}"
    says = f"{judge.url} says {words}"
    if words.startswith(("HTTP 401", "HTTP 403")):
        given = "is not accepted" if judge.key else "is not set"
        return f"ORACLE_API_KEY {given}: {says}; set this environment variable"
    if pictures and failed.cause in ("refused", "server", "bad_reply"):
        return f"{option}_frames {judge.frames}: {judge.model} refuses pictures: {words}; use 0"
    if failed.cause == "refused":
        named = [name for name in judge.request if name not in ("model", "messages") and name in words]
        if named:
            out = {named[0]: None}
            if "max_completion_tokens" in words:  # some servers want it in place of max_tokens
                out["max_completion_tokens"] = 1024
            return f"{option}_body: {says}; give {option}_body '{json.dumps(out)}'"
    for pattern, name, remedy in REFUSALS:
        if re.search(pattern, words, re.IGNORECASE):
            return f"{option}_{name} {getattr(judge, name)}: {says}; {remedy}"
    if failed.cause == "refused":
        return f"{option}_body: {says}; {remedy_of('refused', judge.option)}"
    return f"{option}_url {judge.url}: {failed.cause}, {words}; start the server or correct the address"
