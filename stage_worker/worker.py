"""The worker's main thread: takes commands from the control link and steps from the data plane, one at a time."""

import logging
import math
import time

import torch
import zmq

from glm.model import LayerStack
from protocol.control import Assign, Failed, Inspect, Inspected, Progress, Ready, Release, Released
from protocol.data import DataMessage, StageTiming, Step, StepFailed
from protocol.errors import DescriptorError, EndpointError, ProtocolError, SecurityError
from protocol.limits import MAX_INSPECTED_BYTES, clip_text
from protocol.messages import Plane
from protocol.records import with_changes
from protocol.sockets import Socket, send_frames
from protocol.tensors import RawTensor
from protocol.torch_bridge import Landing, to_raw
from protocol.wire import decode, encode, encode_valid
from stage_worker.cli import OwnModel
from stage_worker.control_link import Command, ControlLink, CoordinatorLost
from stage_worker.data_plane import DataPlane
from stage_worker.errors import AbandonedError, InspectError, LoadError
from stage_worker.loading import load_stage
from stage_worker.log import facts, logger
from stage_worker.memory import resident_bytes, return_memory
from stage_worker.stage import Stage
from stage_worker.status import Status

SEND_TIMEOUT_S = 30.0
DESCRIPTORS_WAIT_S, DESCRIPTORS_LOOK_S = 30.0, 0.1
"""How long a worker without a descriptor left waits for one."""
_WIRE_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


class Worker:
    """Serves until the link says to leave. The caller closes the link and the data plane.

    `model` is what this host was told to load, whatever the coordinator calls it.
    """

    def __init__(
        self, link: ControlLink, data_plane: DataPlane, device: torch.device, model: OwnModel | None = None
    ) -> None:
        self._link = link
        self._data_plane = data_plane
        self._device = device
        self._landing = Landing()
        self._model = model
        self._kept: tuple[Assign, LayerStack] | None = None
        self._assign: Assign | None = None
        self._stage: Stage | None = None
        self._data_out: Socket | None = None
        self._last_step_id = 0

    @torch.inference_mode()
    def serve(self) -> None:
        """The loop. Returns when it is time to leave, with everything released."""
        try:
            while not self._link.leaving:
                frames = self._data_plane.receive()
                if frames is not None:
                    self._take_data(frames, time.monotonic())
                    continue
                while not self._link.leaving and (command := self._link.take_command()) is not None:
                    self._obey(command)
        finally:
            self._give_up()

    # -- commands

    def _obey(self, command: Command) -> None:
        match command:
            case CoordinatorLost():
                self._keep_weights()
            case Assign():
                self._take_assignment(command)
            case Inspect():
                self._inspect(command)
            case Release():
                freed = self._release()
                self._link.send(Released(command.request_id, command.epoch, freed))

    def _take_assignment(self, assign: Assign) -> None:
        level = logging.WARNING
        try:
            self._load(assign)
            return
        except LoadError as error:  # kept no longer than this: its traceback holds what was loaded
            failed = Failed(assign.request_id, assign.epoch, error.code, clip_text(error.text))
        except AbandonedError:
            level = logging.INFO  # as was asked
            failed = Failed(assign.request_id, assign.epoch, "bad_request", "released while loading")
        self._give_up()
        logger.log(level, "epoch %d not taken: %s", assign.epoch, failed.text)
        self._link.send(failed)

    def _load(self, assign: Assign) -> None:
        started_s = time.monotonic()
        kept = self._weights_for(assign)
        if kept is None:
            self._give_up()
        self._link.status = Status("loading", assign.epoch)
        facts.update(stage=assign.stage_index + 1, epoch=assign.epoch)
        if self._data_out is not None:
            self._data_out.close()
            self._data_out = None
        self._data_out = self._open_next(assign)

        def report(layers_done: int, layers_total: int, weight_bytes: int) -> None:
            if self._link.abandoned():
                raise AbandonedError(f"loading epoch {assign.epoch}")
            self._link.status = with_changes(self._link.status, weight_bytes=weight_bytes)
            self._link.send(Progress(0, assign.epoch, layers_done, layers_total, weight_bytes))

        if kept is not None:
            self._stage, self._kept = Stage(kept, assign.kv_budget_tokens, assign.record_hidden_states), None
            logger.info("these layers were still here")
        else:
            report(0, assign.layer_end - assign.layer_start, 0)
            self._stage = load_stage(assign, self._device, report, self._model)
        self._assign, self._last_step_id, self._link.num_taken = assign, 0, 0
        self._announce(assign, self._stage, time.monotonic() - started_s)

    def _open_next(self, assign: Assign) -> Socket:
        """The way to the next hop; what this process lacks for a moment is waited for."""
        give_up_at_s = time.monotonic() + DESCRIPTORS_WAIT_S
        while True:
            try:
                return self._data_plane.open_next(assign)
            except (EndpointError, SecurityError) as error:
                raise LoadError("unreachable", f"next hop: {error}") from None
            except DescriptorError as error:
                if time.monotonic() >= give_up_at_s:
                    raise LoadError("internal", str(error)) from None
            if self._link.abandoned():
                raise AbandonedError(f"loading epoch {assign.epoch}")
            time.sleep(DESCRIPTORS_LOOK_S)

    def _weights_for(self, assign: Assign) -> LayerStack | None:
        """The layers held already, if they are what is assigned: only the KV caches are given up then."""
        held = self._held()
        if held is None or assign.fingerprint == "":
            return None
        old, layers = held
        wanted = (assign.fingerprint, assign.layer_start, assign.layer_end, assign.precision)
        return layers if wanted == (old.fingerprint, old.layer_start, old.layer_end, old.precision) else None

    def _held(self) -> tuple[Assign, LayerStack] | None:
        """Layers in memory and the assignment that they were loaded for: served, or kept after a coordinator's loss."""
        if self._stage is None or self._assign is None:
            return self._kept
        return self._assign, self._stage.layers

    def _announce(self, assign: Assign, stage: Stage, load_s: float) -> None:
        layers = stage.layers
        self._link.status = Status("serving", assign.epoch, weight_bytes=layers.weight_bytes)
        logger.info(
            "serving epoch %d: layers %d-%d, %s, %.1f MB of weights, loaded in %.1f s, %s",
            assign.epoch,
            layers.start + 1,
            layers.end,
            assign.precision,
            layers.weight_bytes / 1e6,
            load_s,
            layers.kernel_path,
        )
        resident = resident_bytes(self._device)
        self._link.send(
            Ready(assign.request_id, assign.epoch, layers.weight_bytes, resident, load_s, layers.kernel_path)
        )

    def _inspect(self, inspect: Inspect) -> None:
        epoch = self._link.status.epoch
        try:
            if self._stage is None:
                raise InspectError("nothing is assigned to this worker")
            held = self._stage.inspect(inspect.sequence_id, inspect.layer, inspect.what)
            most = MAX_INSPECTED_BYTES // (torch.float32.itemsize * math.prod(held.shape[1:]))
            piece = held[inspect.start_pos : inspect.start_pos + most].to("cpu", torch.float32)
            raw = to_raw(piece)
        except (InspectError, ProtocolError) as error:
            self._link.send(Failed(inspect.request_id, epoch, "bad_request", clip_text(str(error))))
            return
        asked = (inspect.sequence_id, inspect.layer, inspect.what, inspect.start_pos)
        self._link.send(Inspected(inspect.request_id, epoch, *asked, num_tokens=len(held)), (raw,))

    def _release(self) -> int:
        """Give up the assignment; returns by how many bytes the resident memory fell."""
        before = resident_bytes(self._device)
        epoch = self._link.status.epoch
        self._give_up()
        freed = max(0, before - resident_bytes(self._device))
        logger.info("released epoch %d: %.1f MB freed", epoch, freed / 1e6)
        return freed

    def _keep_weights(self) -> None:
        """Forget the assignment and all sequences, but not the layers."""
        held = self._held()
        self._give_up()
        self._kept = held
        if held is not None:
            self._link.status = Status(weight_bytes=held[1].weight_bytes)

    def _give_up(self) -> None:
        self._assign = self._stage = self._kept = None
        if self._data_out is not None:
            self._data_out.close()
            self._data_out = None
        return_memory(self._device)
        self._link.status = Status()
        for name in ("stage", "epoch"):
            facts.pop(name, None)

    # -- steps

    def _take_data(self, frames: list[memoryview], received_at_s: float) -> None:
        try:
            message, tensors = decode(frames, Plane.DATA)
            assert isinstance(message, DataMessage)
            if self._stage is None or self._assign is None or message.epoch != self._assign.epoch:
                serving = f"epoch {self._assign.epoch} is served" if self._assign else "nothing is assigned"
                logger.info("dropped step %d of epoch %d: %s", message.step_id, message.epoch, serving)
                return
            if message.step_id <= self._last_step_id:
                logger.warning("dropped step %d: step %d was there before it", message.step_id, self._last_step_id)
                return
            self._last_step_id = message.step_id
            self._link.num_taken += 1
            self._do_step(self._assign, self._stage, message, tensors, received_at_s)
        except ProtocolError as error:
            logger.warning("dropped a data message: %s", error)
        except AbandonedError as error:
            logger.info("abandoned: %s", error)

    def _do_step(
        self,
        assign: Assign,
        stage: Stage,
        message: Step | StepFailed,
        tensors: tuple[RawTensor, ...],
        received_at_s: float,
    ) -> None:
        started_s = time.monotonic()
        answer, result = self._answer(assign, stage, message, tensors)
        ended_s = time.monotonic()
        compute_s = ended_s - started_s
        kv_tokens = stage.kv_tokens
        timing = StageTiming(assign.stage_index, received_at_s, compute_s, ended_s, kv_tokens)
        self._link.status = self._link.status.after_step(compute_s, kv_tokens, stage.num_sequences)
        self._forward(answer.with_timing(timing), result)

    def _answer(
        self, assign: Assign, stage: Stage, message: Step | StepFailed, tensors: tuple[RawTensor, ...]
    ) -> tuple[Step | StepFailed, tuple[RawTensor, ...]]:
        """What goes to the next hop for a message, without this stage's timing."""
        try:
            if isinstance(message, StepFailed):
                stage.apply(message.updates)
                return message, ()
            hidden = stage.run(message, self._landing.take(tensors[0]), self._link.abandoned)
            if assign.activation_dtype is not None:
                hidden = hidden.to(_WIRE_DTYPES[assign.activation_dtype])
            return message, (to_raw(hidden),)
        except AbandonedError:
            raise
        except Exception as error:  # whatever a step ran into, the worker goes on with the next one
            failure = stage.step_error(error)
            code, text = failure.code, clip_text(failure.text)
            del failure
        logger.warning("step %d failed: %s: %s", message.step_id, code, text)
        if code == "out_of_memory":
            return_memory(self._device)
        if isinstance(message, StepFailed):
            return message, ()
        failed = StepFailed(
            message.epoch, message.step_id, assign.stage_index, code, text, message.updates, message.timings
        )
        return failed, ()

    def _forward(self, message: Step | StepFailed, tensors: tuple[RawTensor, ...]) -> None:
        """Send to the next hop. Waits while that is busy or gone, but not for ever, nor if nobody wants the result."""
        assert self._data_out is not None
        frames = encode_valid(message, tensors) if isinstance(message, Step) else encode(message)
        deadline_s = None
        while True:
            try:
                send_frames(self._data_out, frames, zmq.NOBLOCK)
                return
            except zmq.Again:
                deadline_s = deadline_s or time.monotonic() + SEND_TIMEOUT_S
                self._data_out.poll(100, zmq.POLLOUT)
            if self._link.abandoned():
                return
            if time.monotonic() > deadline_s:
                logger.warning("dropped a step: the next hop has taken nothing for %g s", SEND_TIMEOUT_S)
                return
