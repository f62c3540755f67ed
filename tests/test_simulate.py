"""tools/simulate.py: the scheduler at sizes that no test machine can run, and what it shows about policies."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

TOOL = Path(__file__).parents[1] / "tools" / "simulate.py"


# so that little time is simulated
FAST = ("--base-s", "0.016", "--row-s", "0.0005", "--token-s", "0.0009", "--rate", "30", "--light-rate", "1")


def simulate(*arguments) -> dict[str, dict]:
    """The rows of the table by policy."""
    done = subprocess.run([sys.executable, str(TOOL), *FAST, *arguments], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    *lines, last = done.stdout.splitlines()
    rows = json.loads(last)["rows"]
    assert len(lines) == 2 + len(rows) and all(line.split()[0] == row["policy"] for line, row in zip(lines[2:], rows))
    return {row["policy"]: row for row in rows}


def test_a_flood_delays_another_tenant_only_where_nobody_shares():
    rows = simulate("--scenario", "flood", "--requests", "1000", "--policies", "fifo,fair")
    assert rows["fifo"]["lightest_first_token_p50"] > 20 and rows["fair"]["lightest_first_token_p95"] < 1.5
    assert rows["fair"]["tokens_per_s"] == pytest.approx(rows["fifo"]["tokens_per_s"], rel=0.02)


def test_all_policies_serve_a_mixed_trace_whole_and_classes_are_faster_where_they_count():
    rows = simulate("--requests", "1500", "--pages", "400")
    assert {row["requests"] for row in rows.values()} == {1500}
    assert rows["default"]["urgent_first_token_p95"] < 0.1 * rows["fifo"]["urgent_first_token_p95"]
    assert rows["default"]["jain"] > 0.6 > rows["fifo"]["jain"]
    assert all(row["cached_tokens"] > 0 and 0 < row["pages_in_use"] <= 1 for row in rows.values())


def test_overtaking_keeps_pages_busy_while_a_big_request_waits_for_them():
    rows = simulate("--scenario", "big", "--requests", "800", "--policies", "fifo,no-overtaking", "--rate", "100")
    overtaking, none = rows["fifo"], rows["no-overtaking"]
    assert overtaking["pages_in_use"] > none["pages_in_use"] and overtaking["wait_p95"] < none["wait_p95"]
    assert overtaking["longest_wait"] < 1.2 * none["longest_wait"]


def test_after_a_burst_clients_that_obey_retry_after_are_taken_when_they_come_back_and_no_slot_is_idle(tmp_path):
    trace = tmp_path / "burst.jsonl"
    asks = [{"at_s": i / 8, "prompt_tokens": 50, "output_tokens": 16} for i in range(100)]
    asks += [{"at_s": 13, "prompt_tokens": 50, "output_tokens": 16} for _ in range(500)]
    trace.write_text("\n".join(map(json.dumps, asks)))
    arguments = ("--trace", str(trace), "--policies", "fifo")
    obeying = simulate(*arguments, "--max-queue", "64", "--retries")["fifo"]
    assert obeying["refused"] > 300 and obeying["taken_at_first_return"] > 0.9
    everybody = simulate(*arguments)["fifo"]
    assert obeying["simulated_s"] < 1.1 * everybody["simulated_s"]


def test_a_trace_file_says_when_what_comes(tmp_path):
    trace = tmp_path / "trace.jsonl"
    asks = [{"at_s": i, "prompt_tokens": 40, "output_tokens": 5, "prefix": "x", "prefix_tokens": 32} for i in range(9)]
    trace.write_text("\n".join(map(json.dumps, [*asks, {"at_s": 3, "prompt_tokens": 5000, "output_tokens": 9,
                                                        "timeout_s": 0.01}])))
    row = simulate("--trace", str(trace), "--policies", "default")["default"]
    assert (row["requests"], row["timeouts"], row["cached_tokens"]) == (10, 1, 8 * 32)
    assert row["simulated_s"] == pytest.approx(8.2, abs=0.2)
    trace.write_text('{"at_s": 1}')
    done = subprocess.run([sys.executable, str(TOOL), "--trace", str(trace)], capture_output=True, text=True)
    assert done.returncode == 1 and f"{trace}:1" in done.stderr
