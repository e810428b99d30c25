"""A session: limits in force, errors of workers as the driver's, and what it leaves behind."""

from __future__ import annotations

import ast
import logging
import os
import re
import signal
import socket
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from importlib import import_module
from pathlib import Path
from threading import Barrier

import psutil
import pytest
import ray

from pds_ray import distributed
from pds_ray.config import ConfigError, RayConfig
from pds_ray.distributed import (
    lifetime,
    limits,
    metrics,
    places,
    ray_private,
    session,
    tasks,
)
from pds_ray.distributed.address import Address
from pds_ray.errors import UserError
from tests.support.ray_script import output_of

pytestmark = pytest.mark.ray


def test_limits_are_in_force_and_reported() -> None:
    """Limits of nodes are in the raylet's environment, those of Ray Data in its context."""
    told = session.start(RayConfig())
    raylets = [p for p in psutil.Process().children(recursive=True) if p.name() == "raylet"]
    environment = raylets[0].environ()
    for name, (value, why) in {**distributed.DRIVER, **distributed.NODES}.items():
        assert environment[f"RAY_{name}"] == os.environ[f"RAY_{name}"] == told[name]
        assert value == told[name], "set otherwise by whoever runs the tests"
        assert why
    for name, (value, why) in distributed.TRAIN.items():
        assert environment[f"RAY_{name}"] == value
        assert why
    context = ray.data.DataContext.get_current()
    for name, (value, why) in distributed.DATA.items():
        assert getattr(context, name) == value
        assert name in told
        assert why
    assert Path(told["object_spilling_directory"]).is_dir()


def test_an_address_without_a_cluster_is_refused_at_once() -> None:
    with socket.socket() as free:  # bound, not listening: nothing answers there
        free.bind(("127.0.0.1", 0))
        with pytest.raises(ConfigError, match="nothing answers at --address"):
            session._connect(Address(f"127.0.0.1:{free.getsockname()[1]}", "--address"))


def test_a_local_ray_is_as_large_as_the_job(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: dict[str, object] = {}
    monkeypatch.setattr(ray, "init", lambda **options: asked.update(options))
    monkeypatch.setattr(limits, "cpus", lambda: 3)
    monkeypatch.setattr(limits, "free_memory_bytes", lambda: 4 << 30)
    monkeypatch.setattr(session, "_limits_read", {})
    session._start_local(RayConfig())
    assert (asked["num_cpus"], asked["object_store_memory"]) == (3, 1 << 30)
    assert asked["_memory"] == 3 << 30
    assert asked["object_spilling_directory"] is None
    assert type(asked["job_config"]) is type(ray_private.job_config())
    monkeypatch.setenv("RAY_TMPDIR", "/tmp/ü")
    session._start_local(RayConfig(num_cpus=7, object_store_gib=0.5))
    assert (asked["num_cpus"], asked["object_store_memory"]) == (7, 1 << 29)
    assert (asked["_temp_dir"], asked["object_spilling_directory"]) == ("/tmp/ray", "/tmp/ü")
    assert "pds-ray: RAY_TMPDIR /tmp/ü is not ASCII" in capsys.readouterr().err


def test_a_ray_that_does_not_start_is_told_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(**_: object) -> None:
        raise Exception("The current node timed out during startup.\nA trace")

    monkeypatch.setattr(ray, "init", fail)
    with pytest.raises(ConfigError, match=r"^Ray does not start \(The current .*logs has more$"):
        session._start_local(RayConfig())


def test_rays_sockets_are_as_long_as_is_reckoned_with() -> None:
    """They are those of the Ray that runs here."""
    (socket_path,) = Path(ray_private.session_folder(), "sockets").glob("plasma_store")
    longest = f"/{places.RAY_SOCKET.format(pid=os.getpid())}"
    below = str(socket_path).removeprefix(places.ray_folders().sockets)
    assert len(below) == len(longest)
    assert re.sub(r"\d", "0", below) == re.sub(r"\d", "0", longest)


@pytest.mark.parametrize("presses", [1, 2])
def test_an_interrupt_waits_until_a_ray_has_started(presses: int) -> None:
    reached: list[int] = []
    before = signal.signal(signal.SIGINT, signal.default_int_handler)

    def start() -> None:
        with session._interrupts_put_off():
            for press in range(presses):
                signal.raise_signal(signal.SIGINT)
                reached.append(press)
            reached.append(-1)

    try:
        with pytest.raises(KeyboardInterrupt):
            start()
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)
    assert reached == ([0, -1] if presses == 1 else [0])


def user_errors() -> list[str]:
    """Return the errors that the user can mend as "module:class", read off the source.

    Those of the training scripts, which no worker runs, are left out.
    """
    root = Path(distributed.__file__).parents[1]
    classes = {
        node.name: (path, {ast.unparse(base) for base in node.bases})
        for path in sorted(root.rglob("*.py"))
        if path.parent.name != "demo"
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.ClassDef)
    }
    found = {"UserError"}
    while more := {name for name, (_, bases) in classes.items() if bases & found} - found:
        found |= more
    modules = {
        name: ".".join(classes[name][0].relative_to(root.parent).with_suffix("").parts)
        for name in found
    }
    return sorted(f"{module}:{name}" for name, module in modules.items())


def make_error(name: str, message: str) -> UserError:
    module, _, kind = name.partition(":")
    return getattr(import_module(module), kind)(message)


def test_all_kinds_of_user_errors_are_found() -> None:
    assert {"pds_ray.errors:ConfigError", "pds_ray.store.calls:StorageError"} <= set(user_errors())
    assert len(user_errors()) >= 8


@pytest.mark.parametrize("name", user_errors())
def test_a_user_error_of_a_worker_is_raised_as_it_was(name: str) -> None:
    """By a task, by a task that another one waits for, and known by its text alone."""
    error = make_error(name, "no such thing; name another")

    def refuse(_: int) -> None:
        raise error

    def refuse_within(_: int) -> None:
        ray.get(ray.remote(refuse).options(num_cpus=0).remote(0))

    for function in (refuse, refuse_within):
        with pytest.raises(type(error)) as raised, session.unwrapped_errors():
            list(tasks.map_in_order(function, [0]))
        assert type(raised.value) is type(error)
        assert str(raised.value) == "no such thing; name another"

    kind = type(error)
    text = f"Traceback:\n  File 'x'\n{kind.__module__}.{kind.__name__}: gone; name another\nmore"
    with pytest.raises(UserError, match=r"^gone; name another$"), session.unwrapped_errors():
        raise ray.exceptions.RayError(text)


def test_a_user_error_in_a_data_set_is_raised_as_one() -> None:
    def refuse(_: object) -> None:
        raise ConfigError("no such thing; name another")

    data = ray.data.range(1, override_num_blocks=1).map_batches(refuse)
    with (
        pytest.raises(UserError, match=r"^no such thing; name another$"),
        session.unwrapped_errors(),
    ):
        data.materialize()


def test_other_errors_stay_as_they_are() -> None:
    def fail(_: int) -> None:
        raise ZeroDivisionError("ours")

    with pytest.raises(ZeroDivisionError), session.unwrapped_errors():
        list(tasks.map_in_order(fail, [0]))
    ours = ConfigError("of the driver")
    with pytest.raises(ConfigError) as raised, session.unwrapped_errors():
        raise ours
    assert raised.value is ours


def test_a_ray_that_was_there_before_a_session_survives_it(monkeypatch) -> None:
    """Environment, Ray Data's options and log levels are as before, too."""
    undo = ExitStack()
    monkeypatch.setattr(lifetime, "undo", lambda: undo)  # forget that `start` began this Ray
    monkeypatch.setattr(session, "_limits_read", {})
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    monkeypatch.setenv("RAY_DATA_DISABLE_PROGRESS_BARS", "0")
    context = ray.data.DataContext.get_current()
    monkeypatch.setattr(context, "max_errored_blocks", 5)
    before, level = dict(os.environ), logging.getLogger("ray.data").level
    reported = session.start(RayConfig())
    assert os.environ["OMP_WAIT_POLICY"] == "PASSIVE"
    assert os.environ["RAY_DATA_DISABLE_PROGRESS_BARS"] == "0", "what the user sets stays"
    assert context.max_errored_blocks == 0
    assert "memory_usage_threshold" not in reported, "nobody knows what its nodes read"
    session.start(RayConfig())  # as a second run of the process
    session.stop()
    assert ray.is_initialized()
    assert dict(os.environ) == before
    assert (context.max_errored_blocks, logging.getLogger("ray.data").level) == (5, level)
    session.stop()
    assert ray.is_initialized()


OWN_RAY = """
import os, sys
before = dict(os.environ)
from pds_ray.distributed import embed, evaluate, session
from pds_ray.config import RayConfig
import ray
print({name for name in os.environ.keys() - before.keys() if name.startswith(("RAY_", "OMP_"))})
before = dict(os.environ)
os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
config = RayConfig(object_store_gib=0.1)
told = session.start(config)
print(told["memory_usage_threshold"], told["cpus"], ray.is_initialized())
session.stop()
print(ray.is_initialized(), os.environ.keys() - before.keys())
ray.init(num_cpus=1, include_dashboard=False)
session.start(config)
session.stop()
print(ray.is_initialized())
"""


@pytest.mark.long
def test_a_ray_that_a_session_began_ends_with_it() -> None:
    """And is as large as the affinity of its job."""
    assert output_of(OWN_RAY) == ["set()", "0.95 1.0 True", "False set()", "True"]


@pytest.mark.parametrize("package", ["pds_ray.distributed", "pds_ray.distributed.session"])
def test_importing_sets_no_environment_variable(package: str) -> None:
    script = (
        f"import ray, os; before = dict(os.environ); import {package}; print(os.environ == before)"
    )
    assert output_of(script) == ["True"]


def test_metrics_of_two_runs_in_one_process_are_apart(monkeypatch) -> None:
    counted = []

    class Counter:
        def inc(self, amount: float, tags: dict[str, str]) -> None:
            counted.append((amount, tags["run"]))

    monkeypatch.setattr(metrics, "_counter", lambda _: Counter())
    together = Barrier(2)

    def run(name: str, amount: float) -> None:
        session.start(RayConfig(), name)
        together.wait(60)  # both runs have begun before either counts
        metrics.count("pds_ray_shards_committed_total", amount)

    with ThreadPoolExecutor(2) as threads:
        list(threads.map(run, ["one", "two"], [1.0, 2.0]))
    assert sorted(counted) == [(1.0, "one"), (2.0, "two")]
