"""Program that runs front ends of the same index on one Ray cluster, some of which are killed.

    python tests/sharded_fronts.py INDEX

Prints a JSON object. With the argument --front it is one of the front ends: it answers each line of
stdin by the number of hits and of missing parts.
"""

import json
import os
import signal
import subprocess
import sys
import time

from network import find_processes, start_loopback

PARTS = 2


def answer_lines(location):
    from xclip_jax.search.sharded import open_sharded

    signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored below background processes
    with open_sharded(location, PARTS, address="auto") as index:
        print("ready", flush=True)
        for line in sys.stdin:
            answer = index.query(line.strip(), k=100, merge=False)
            print(len(answer), answer.missing, flush=True)


def start(location):
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    front = subprocess.Popen([sys.executable, __file__, location, "--front"], **pipes)
    assert front.stdout.readline() == "ready\n"
    return front


def ask(front):
    front.stdin.write("a red dog\n")
    front.stdin.flush()
    return front.stdout.readline().split()


def list_parts():
    """Returns {id of a front end: number of its parts that are deployed}."""
    from ray import serve

    counts = {}
    for name in serve.status().applications:
        front = name.rpartition("-")[0]
        counts[front] = counts.get(front, 0) + 1
    return counts


def wait_for(number):
    """Returns the front ends that have parts, as soon as these are `number`."""
    deadline = time.monotonic() + 60
    while len(fronts := list_parts()) != number and time.monotonic() < deadline:
        time.sleep(0.2)
    return fronts


def main():
    location = sys.argv[1]
    if "--front" in sys.argv:
        return answer_lines(location)
    start_loopback()
    options = ["--head", "--num-cpus=6", "--include-dashboard=false", "--disable-usage-stats"]
    subprocess.run(["ray", "start", *options], check=True, stdout=subprocess.DEVNULL)
    try:
        import ray

        first, second = start(location), start(location)
        facts = {"both": [ask(first), ask(second)]}
        ray.init("auto", log_to_driver=False, logging_level="error")
        facts["deployed"] = sorted(list_parts().values())
        first.kill()
        first.wait()
        third = start(location)
        facts["after_kill"] = [ask(second), ask(third)]
        facts["orphans_deleted"] = sorted(wait_for(2).values())
        second.send_signal(signal.SIGINT)
        second.wait()
        facts["after_ctrl_c"] = [ask(third), sorted(wait_for(1).values())]
        third.kill()
        print(json.dumps(facts), flush=True)
    finally:
        for pid in find_processes():  # `ray stop` would end those of other clusters
            os.kill(pid, signal.SIGKILL)
    return None


if __name__ == "__main__":
    main()
