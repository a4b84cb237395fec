import pytest
from judge_server import JudgeServer


@pytest.fixture
def serve():
    servers = []

    def start(brain):
        servers.append(JudgeServer(brain))
        return servers[-1]

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()
