"""Puts a worker process together, and takes it apart: device, sockets, control thread, main loop."""

import os
import platform
from contextlib import closing

import torch
import zmq

from glm.errors import GlmError
from glm.kernels.diagnosis import native_state
from protocol.control import HostModel, Join
from protocol.descriptors import raise_descriptor_limit
from protocol.errors import DescriptorError, EndpointError, SecurityError
from protocol.key_files import KeyDirectory
from protocol.limits import MAX_NAME, clip_text
from protocol.sockets import Socket
from protocol.version import VERSION
from stage_worker.cli import WorkerOptions
from stage_worker.connection import KeySource
from stage_worker.control_link import ControlLink, LinkSettings
from stage_worker.data_plane import DataPlane, listening_endpoint, unlink_socket
from stage_worker.device import device_facts, parse_device
from stage_worker.errors import DeviceError
from stage_worker.exits import EXIT_INTERNAL, EXIT_USAGE
from stage_worker.lifeline import remove_private_dir
from stage_worker.loading import host_model
from stage_worker.log import facts, logger, set_up_logging
from stage_worker.worker import Worker


def run_worker(options: WorkerOptions, signal_fd: int) -> int:
    """Join, serve, leave; returns the exit code. `signal_fd` becomes readable when a signal asks to leave."""
    set_up_logging(as_json=options.log_json)
    raise_descriptor_limit()
    facts.update(worker=options.worker_id, device=options.device)
    if options.num_threads is not None:
        torch.set_num_threads(options.num_threads)
    context: zmq.Context[Socket] = zmq.Context()
    try:
        keys = None if options.server_key is None else _own_keys(options)
        model = host_model(options.model)
        device = _usable_device(options.device)
        endpoint = options.listen or listening_endpoint(options.join)
        is_guarded = keys is not None or options.listen is not None
        with closing(DataPlane(context, endpoint, is_guarded=is_guarded)) as data_plane:
            return _serve(options, context, data_plane, device, signal_fd, keys, model)
    except (DescriptorError, DeviceError, EndpointError, GlmError, SecurityError) as error:
        logger.error("%s", error)
        return EXIT_USAGE
    except Exception:
        logger.exception("the worker failed")
        return EXIT_INTERNAL
    finally:
        context.term()


def _own_keys(options: WorkerOptions) -> KeySource:
    """Gives this host's key pair. Whoever has a token needs no key beforehand. Raises SecurityError."""
    directory = KeyDirectory(options.keys)
    if options.token is not None and not directory.own_path.exists():
        logger.info("made a key for this host, %s", directory.own_path)
        directory.make_own()
    directory.own()
    return directory.own


def _usable_device(name: str) -> torch.device:
    """Raises DeviceError."""
    device = parse_device(name)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    device_facts(device)
    return device


def _serve(
    options: WorkerOptions,
    context: "zmq.Context[Socket]",
    data_plane: DataPlane,
    device: torch.device,
    signal_fd: int,
    keys: KeySource | None,
    model: HostModel | None,
) -> int:
    def leave_stuck(code: int) -> None:
        unlink_socket(data_plane.endpoint)
        os._exit(code)

    def join() -> Join:
        return _join(options, data_plane, device, link.status.weight_bytes, model)

    link = ControlLink(
        context,
        LinkSettings(
            options.join,
            options.worker_id,
            join,
            options.join_timeout_s,
            signal_fd,
            options.lifeline_fd,
            keys,
            options.server_key,
            has_token=options.token is not None,
        ),
        pong=lambda status, request_id, num_taken: status.pong(request_id, device, num_taken),
        on_lifeline_end=lambda: remove_private_dir(options.join),
        on_stuck=leave_stuck,
        wake_endpoint=data_plane.wake_endpoint,
    )
    try:
        link.start()
        Worker(link, data_plane, device, options.model).serve()
        return link.exit_code
    finally:
        link.close()


def _join(
    options: WorkerOptions, data_plane: DataPlane, device: torch.device, kept_bytes: int, model: HostModel | None
) -> Join:
    """Who this worker is, and what it has now; weights that it only keeps count as free. Raises DeviceError."""
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
        memory_free_bytes=facts.memory_free_bytes + kept_bytes,
        num_threads=torch.get_num_threads(),
        kernels=(device.type == "cpu" and native_state().usable) or ("torch",),
        data_endpoint=data_plane.endpoint,
        public_key=data_plane.keys.public,
        is_guarded=data_plane.is_guarded,
        token=options.token,
        model=model,
    )
