"""Random requests from the OpenAPI document against a whole stack on the simulated engine.

    python -m loadtests.fuzz_api SCHEMATHESIS [SECONDS]

Ends with 1 when schemathesis finds something. Two of its checks are off: that all that fits the
schema is accepted (what a schema can't say is refused with 400: a model that doesn't exist, two
parameters that contradict each other), and that `Allow` names the methods of one described path
(`/v1/jobs/cancel` lies within `/v1/jobs/{job_id}`).
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile

_OFF = "positive_data_acceptance,allow_header_conformance"


def main(schemathesis: str, seconds: int) -> int:
    """Start the stack, run the fuzzer for a time, end the stack."""
    with tempfile.TemporaryDirectory(prefix="forebay-fuzz-") as folder:
        command = [
            *(sys.executable, "-m", "api.cli", "up", "--engine", "simulated"),
            *("--data-dir", folder, "--api-port", "0", "--flower-port", "0"),
        ]
        # One wait as a caller may ask for it is long enough to be found.
        environment = {**os.environ, "FOREBAY_API__MAX_WAIT_S": "1"}
        environment |= {"FOREBAY_SIMULATED__STEP_MS": "1", "FOREBAY_API__SYNC_TIMEOUT_S": "10"}
        environment["FOREBAY_LOG__LEVEL"] = "warning"
        environment |= {"FOREBAY_AUTH__FAILURES_PER_MINUTE": "100000"}
        with subprocess.Popen(command, stdout=subprocess.PIPE, env=environment) as stack:
            try:
                assert stack.stdout is not None
                ready = json.loads(stack.stdout.readline())
                return _fuzz(schemathesis, ready["api"], ready["admin_key"], seconds)
            finally:
                stack.send_signal(signal.SIGTERM)
                stack.wait(30)


def _fuzz(schemathesis: str, url: str, key: str, seconds: int) -> int:
    return subprocess.run(
        [
            *(schemathesis, "run", f"{url}/openapi.json", "-H", f"Authorization: Bearer {key}"),
            *("--exclude-checks", _OFF, "--phases", "examples,coverage,fuzzing"),
            *("--max-time", str(seconds), "--continue-on-failure", "--warnings", "off"),
            *("--suppress-health-check", "all", "--request-timeout", "20"),
        ],
        check=False,
    ).returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], int(sys.argv[2]) if len(sys.argv) > 2 else 60))
