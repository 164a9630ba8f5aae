"""Schemathesis sends what the OpenAPI document allows, and what it forbids: no answer is the
server's failure.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.one_process import Platform, platform, settings_for

# Small pictures, so that thousands of requests are drawn in minutes; everything else is as a team
# would serve it.
LIMITS = {"steps": 4, "pixels": 24 * 24, "images": 2, "prompt_characters": 200}
CHECKS = (
    "not_a_server_error,status_code_conformance,content_type_conformance,"
    "response_schema_conformance,ignored_auth"
)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_nothing_that_fuzzing_sends_is_a_server_error(
    served: Platform, model: Path, tmp_path: Path
) -> None:
    with platform(settings_for(model, tmp_path / "kept", limits=LIMITS), served.flow) as running:
        command = [
            sys.executable, "-m", "schemathesis.cli", "run", f"{running.url}/openapi.json",
            "--header", f"Authorization: Bearer {running.key}", "--checks", CHECKS,
            "--max-examples", "60",
            "--generation-deterministic", "--continue-on-failure", "--no-color",
            "--request-timeout", "60",
        ]  # fmt: skip
        done = subprocess.run(
            command, cwd=tmp_path, capture_output=True, text=True, timeout=3000, check=False
        )
        told = done.stdout[-8000:] + done.stderr[-2000:]
        assert done.returncode == 0, told
        tested = re.search(r"Operations:\s+(\d+) selected / (\d+) total", done.stdout)
        assert tested is not None, told
        assert tested[1] == tested[2], told
        # It was no empty run: pictures were drawn, and the server is there.
        assert '"issued"' in (tmp_path / "kept" / "audit.jsonl").read_text()
        assert running.draw().status == 200
