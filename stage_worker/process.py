"""Puts a worker process together, and takes it apart: device, sockets, control thread, main loop."""

import os
import platform
from contextlib import suppress
from pathlib import Path

import torch
import zmq

from glm.kernels.diagnosis import native_state
from protocol.control import Join
from protocol.endpoints import ipc_path
from protocol.errors import EndpointError
from protocol.limits import MAX_NAME, clip_text
from protocol.sockets import Socket, bind, data_socket
from protocol.version import VERSION
from stage_worker.cli import WorkerOptions
from stage_worker.control_link import EXIT_INTERNAL, EXIT_USAGE, ControlLink, LinkSettings
from stage_worker.device import device_facts, parse_device
from stage_worker.errors import DeviceError
from stage_worker.lifeline import remove_private_dir
from stage_worker.log import facts, logger, set_up_logging
from stage_worker.worker import Worker


def run_worker(options: WorkerOptions, signal_fd: int) -> int:
    """Join, serve, leave; returns the exit code. `signal_fd` becomes readable when a signal asks to leave."""
    set_up_logging(as_json=options.log_json)
    facts.update(worker=options.worker_id, device=options.device)
    if options.num_threads is not None:
        torch.set_num_threads(options.num_threads)
    context: zmq.Context[Socket] = zmq.Context()
    data_in = data_socket(context, zmq.PULL)
    data_endpoint = ""
    try:
        data_endpoint = bind(data_in, _data_endpoint(options.join))
        join = _join(options, data_endpoint)
        return _serve(options, join, signal_fd, context, data_in)
    except (DeviceError, EndpointError) as error:
        logger.error("%s", error)
        return EXIT_USAGE
    except Exception:
        logger.exception("the worker failed")
        return EXIT_INTERNAL
    finally:
        data_in.close()
        context.term()
        _unlink_socket(data_endpoint)


def _serve(options: WorkerOptions, join: Join, signal_fd: int, context: "zmq.Context[Socket]", data_in: Socket) -> int:
    device = torch.device(join.device)

    def leave_stuck(code: int) -> None:
        _unlink_socket(join.data_endpoint)
        os._exit(code)

    link = ControlLink(
        context,
        LinkSettings(options.join, join, options.join_timeout_s, signal_fd, options.lifeline_fd),
        pong=lambda status, request_id: status.pong(request_id, device),
        on_lifeline_end=lambda: remove_private_dir(options.join),
        on_stuck=leave_stuck,
    )
    try:
        link.start()
        Worker(context, link, data_in, device).serve()
        return link.exit_code
    finally:
        link.close()


def _data_endpoint(join_endpoint: str) -> str:
    """Where this worker listens: beside the coordinator's socket, or on a free port of the same loopback address."""
    socket_path = ipc_path(join_endpoint)
    if socket_path is not None:
        return f"ipc://{socket_path.parent}/worker-{os.getpid()}"
    return join_endpoint.rpartition(":")[0] + ":*"


def _unlink_socket(endpoint: str) -> None:
    """ZeroMQ leaves the file of an ipc socket behind."""
    socket_path = ipc_path(endpoint)
    if socket_path is not None:
        with suppress(OSError):
            Path(socket_path).unlink()


def _join(options: WorkerOptions, data_endpoint: str) -> Join:
    """Who this worker is. Raises DeviceError."""
    device = parse_device(options.device)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    facts = device_facts(device)
    return Join(
        request_id=1,
        worker_id=options.worker_id,
        glmpipe_version=VERSION,
        torch_version=str(torch.__version__),
        host=clip_text(platform.node() or "localhost", MAX_NAME),
        pid=os.getpid(),
        device=str(device),
        device_name=clip_text(facts.name, MAX_NAME),
        memory_total_bytes=facts.memory_total_bytes,
        memory_free_bytes=facts.memory_free_bytes,
        num_threads=torch.get_num_threads(),
        kernels=(device.type == "cpu" and native_state().usable) or ("torch",),
        data_endpoint=data_endpoint,
    )
