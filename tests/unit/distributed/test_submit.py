"""Jobs: paths that they may name, targets that they may not share, connections that break."""

from __future__ import annotations

import asyncio
import socket
import threading
import time
from collections.abc import Iterator

import pytest
from aiohttp import web

from pds_ray.config import ConfigError
from pds_ray.distributed import submit as jobs
from pds_ray.distributed.submit import Job

ROUNDS = [["one\ntwo\n", "thr"], ["one\ntwo\nthree\n", "four\n"]]
"""Texts of two connections: Ray sends each the log from its beginning."""


def job(**paths: str) -> Job:
    return Job(["distill"], paths, None, {}, 0, installed=True)


@pytest.mark.parametrize(
    "source",
    [
        "flickr30k:/data/Flickr30k",
        "flickr30k:/data/Flickr30k:test",
        "coco:/data/COCO:val",
        "scenes:100:7",
        "/data/{00..09}.tar",
        "/data/a:b/*.tar",
        "file:///data/a.tar",
        "s3://bucket/{0..9}.tar?region=r",
    ],
)
def test_places_that_all_nodes_know_may_be_in_a_job(source: str) -> None:
    job(out="/runs/x", source=source, test=source).check()


@pytest.mark.parametrize(
    "source",
    [
        "flickr30k:data/Flickr30k:test",
        "coco:COCO",
        "data/*.tar",
        "a:/data/*.tar",
        "file://data/a.tar",
        "coco",
    ],
)
def test_relative_paths_are_refused(source: str) -> None:
    with pytest.raises(ConfigError, match="a path that all nodes have"):
        job(out="/runs/x", test=source).check()


@pytest.mark.parametrize(
    "ways",
    [
        [
            "s3://bucket/run",
            "s3://bucket/run/",
            "s3://bucket/run?region=r",
            "s3://bucket/run/?region=r&scheme=http",
        ],
        ["/runs/x", "/runs/x/", "/runs//x", "file:///runs/x"],
        ["coco:/data/COCO:val"],
        ["scenes:100:7"],
    ],
)
def test_a_place_is_one_target_however_it_is_written(ways: list[str]) -> None:
    assert {job(out=path).target for path in ways} == {ways[0]}


def test_the_target_is_the_first_place_of_the_command() -> None:
    assert job(source="scenes:9", out="/runs/x").target == "/runs/x"
    assert job(set="/runs/x", test="scenes:9").target == "/runs/x"
    assert job().target == "distill"


class Head:
    """The Jobs API of a head in a thread: a log, a state, and connections that can break."""

    def __init__(self, port: int) -> None:
        self.address = f"http://127.0.0.1:{port}"
        self.port = port
        self.rounds = 0
        self.comes_back = True
        self.state = "RUNNING"
        self.submitted: dict = {}
        self.without_agent = 0
        """Attempts to submit that fail because no node can start jobs yet."""
        self._loop = asyncio.new_event_loop()
        threading.Thread(target=self._loop.run_forever, daemon=True).start()

    def _do(self, coroutine) -> None:
        asyncio.run_coroutine_threadsafe(coroutine, self._loop).result(20)

    def up(self) -> None:
        self._do(self._up())

    def down(self) -> None:
        """From now on connections are refused."""
        self._do(self._runner.cleanup())

    def close(self) -> None:
        self.down()
        self._loop.call_soon_threadsafe(self._loop.stop)

    async def _up(self) -> None:
        app = web.Application()
        app.add_routes(
            [
                web.get("/api/version", self._version),
                web.get("/api/jobs/", self._jobs),
                web.post("/api/jobs/", self._submit),
                web.get("/api/jobs/{job}", self._info),
                web.get("/api/jobs/{job}/logs/tail", self._tail),
                web.route("*", "/api/packages/{protocol}/{name}", self._package),
            ]
        )
        self._runner = web.AppRunner(app, shutdown_timeout=0)
        await self._runner.setup()
        await web.TCPSite(self._runner, "127.0.0.1", self.port, reuse_address=True).start()

    async def _version(self, _: web.Request) -> web.Response:
        return web.json_response(
            {"version": "4", "ray_version": "2.60.0", "ray_commit": "", "session_name": ""}
        )

    async def _package(self, _: web.Request) -> web.Response:
        return web.Response()

    async def _jobs(self, _: web.Request) -> web.Response:
        return web.json_response([])

    async def _submit(self, request: web.Request) -> web.Response:
        if self.without_agent:
            self.without_agent -= 1
            text = "No available agent to submit job, please try again later."
            return web.Response(status=500, text=text)
        self.submitted = await request.json()
        name = self.submitted["submission_id"]
        return web.json_response({"job_id": name, "submission_id": name})

    async def _info(self, request: web.Request) -> web.Response:
        return web.json_response(
            {
                "type": "SUBMISSION",
                "submission_id": request.match_info["job"],
                "status": self.state,
                "entrypoint": "",
            }
        )

    async def _tail(self, request: web.Request) -> web.StreamResponse:
        connection = web.WebSocketResponse()
        await connection.prepare(request)
        told = ROUNDS[self.rounds]
        self.rounds += 1
        for text in told:
            await connection.send_str(text)
        if self.rounds == len(ROUNDS):
            self.state = "SUCCEEDED"
            await connection.close()
        else:
            request.transport.abort()
            threading.Thread(target=self._break).start()
        return connection

    def _break(self) -> None:
        self.down()
        if self.comes_back:
            time.sleep(1.0)
            self.up()


@pytest.fixture
def head(monkeypatch: pytest.MonkeyPatch) -> Iterator[Head]:
    monkeypatch.setattr(jobs, "FOLLOW_AGAIN_S", 0.05)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    running = Head(port)
    running.up()
    yield running
    running.close()


def test_a_broken_connection_is_resumed(head: Head, capsys: pytest.CaptureFixture[str]) -> None:
    """The log comes whole and once, though nothing listens for a while."""
    assert jobs.follow("job-1", head.address) == ("SUCCEEDED", 0)
    assert capsys.readouterr().out == "one\ntwo\nthree\nfour\n"


def test_a_cluster_that_stays_silent_is_one_line(
    head: Head, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jobs, "PATIENCE_S", 0.3)
    head.comes_back = False
    with pytest.raises(ConfigError) as refused:
        jobs.follow("job-1", head.address)
    assert f"`ray job logs -f --address {head.address} job-1`" in str(refused.value)
    assert "nothing answers" in str(refused.value)
    assert "\n" not in str(refused.value)


def test_a_connection_that_breaks_before_the_job_is_there_is_one_line(
    head: Head, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = jobs._client(head.address)
    monkeypatch.setattr(jobs, "_client", lambda _: client)
    head.down()
    with pytest.raises(ConfigError, match="submit again"):
        jobs.submit(job(out="/runs/x"), head.address)


@pytest.mark.parametrize(
    ("given", "wait"), [({}, "30"), ({"RAY_JOB_STOP_WAIT_TIME_S": "5", "A": "1"}, "5")]
)
def test_a_stopped_driver_gets_time(head: Head, given: dict[str, str], wait: str) -> None:
    jobs.submit(Job(["distill"], {"out": "/runs/x"}, None, given, 0, installed=True), head.address)
    assert head.submitted["runtime_env"]["env_vars"] == {**given, "RAY_JOB_STOP_WAIT_TIME_S": wait}


def test_a_cluster_that_cannot_start_jobs_yet_is_waited_for(
    head: Head, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Once it can, the job is submitted; until then one line says what is waited for."""
    monkeypatch.setattr(jobs, "AGENT_POLL_S", 0.01)
    head.without_agent = 3
    submitted = jobs.submit(job(out="/runs/x"), head.address)
    assert head.submitted["submission_id"] == submitted
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("pds-ray:")]
    assert said == ["pds-ray: the cluster cannot start jobs yet; waiting for one of its nodes"]


def test_a_cluster_that_never_starts_jobs_is_one_line(
    head: Head, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jobs, "AGENT_POLL_S", 0.01)
    monkeypatch.setattr(jobs, "AGENT_WAIT_S", 0.0)
    head.without_agent = 10**9
    with pytest.raises(ConfigError) as refused:
        jobs.submit(job(out="/runs/x"), head.address)
    assert "none of its nodes could start a job (no job agent)" in str(refused.value)
    assert "\n" not in str(refused.value)


def test_other_refusals_of_a_cluster_are_not_waited_out(head: Head, monkeypatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise RuntimeError("Request failed with status code 500: no such environment")

    monkeypatch.setattr(jobs.JobSubmissionClient, "submit_job", refuse)
    with pytest.raises(ConfigError, match=r"refuses the job: .*no such environment"):
        jobs.submit(job(out="/runs/x"), head.address)
