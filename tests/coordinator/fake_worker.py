"""Stands in for a stage worker in launcher tests: `fake_worker.py BEHAVIOUR` plus a worker's options."""

import argparse
import os
import signal
import sys
import time


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("behaviour")
    for option in ("--join", "--device", "--threads", "--worker-id"):
        parser.add_argument(option, required=True)
    parser.add_argument("--log-json", action="store_true", required=True)
    parser.add_argument("--lifeline-fd", type=int, required=True)
    options = parser.parse_args()
    print(f"hello from {os.getpid()} {options.worker_id} {options.join} x{options.threads}", flush=True)
    print("and \xe9 on stderr", file=sys.stderr, flush=True)
    if options.behaviour == "dies":
        sys.exit(3)
    if options.behaviour == "is-killed" and options.worker_id == "stage-2":
        os.kill(os.getpid(), signal.SIGKILL)
    if options.behaviour == "stubborn":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        print("ready", flush=True)
        time.sleep(600)
    print("ready", flush=True)
    os.read(options.lifeline_fd, 1)


if __name__ == "__main__":
    main()
