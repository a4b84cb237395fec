"""A chat-completions server on this machine that answers as its `brain` says."""

import http.server
import json
import socketserver
import threading
import time


class Handler(http.server.BaseHTTPRequestHandler):
    def do_POST(self):
        began = time.perf_counter()
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.server.lock:
            self.server.requests.append(body)
        status, headers, content, cut = 200, {}, None, 0
        reply = self.server.brain(body)
        if isinstance(reply, tuple):
            status, headers, content, cut = reply
        if status == "drop":
            self.connection.close()
            return
        if content is None:
            choice = {"message": {"role": "assistant", "content": reply}, "finish_reason": "stop"}
            if reply == "LENGTH":
                choice["finish_reason"] = "length"
            content = json.dumps({"choices": [choice], "usage": {"total_tokens": 10}})
        content = content if isinstance(content, bytes) else content.encode()
        for early in self.server.early:
            self.send_response_only(early)
            self.end_headers()
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content) + cut))
        self.end_headers()
        self.wfile.write(content)
        with self.server.lock:
            self.server.held += time.perf_counter() - began

    def log_message(self, *args):
        pass


class JudgeServer(socketserver.ThreadingMixIn, http.server.HTTPServer):
    daemon_threads, request_queue_size = True, 256

    def __init__(self, brain):
        super().__init__(("127.0.0.1", 0), Handler)
        self.early = ()  # statuses before that of the reply
        self.brain, self.lock, self.requests, self.held = brain, threading.Lock(), [], 0.0
        self.url = f"http://127.0.0.1:{self.server_address[1]}/v1"
        threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True).start()

    def handle_error(self, *args):
        pass  # clients that hang up are part of these tests
