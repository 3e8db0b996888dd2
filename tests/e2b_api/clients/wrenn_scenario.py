"""What a user of Wrenn's own client does: prints one line per feature, as `scenario.py` does."""

import json
import traceback

import wrenn

capsule = wrenn.Capsule.create()
client = wrenn.WrennClient()


def info():
    assert capsule.get_info().id == capsule.capsule_id
    assert capsule.capsule_id in {each.id for each in wrenn.Capsule.list()}


def run():
    assert capsule.commands.run("echo hi").stdout == "hi\n"


def files():
    capsule.files.write("scenario.txt", "text")
    assert capsule.files.read("scenario.txt") == "text"


def pause_and_connect():
    capsule.pause()
    capsule.resume()
    assert capsule.files.read("scenario.txt") == "text"


def metrics():
    assert client.capsules.metrics(capsule.capsule_id, range="5m").points is not None
    assert client.capsules.stats(range="1h").current.running_count >= 1
    assert client.capsules.usage().points


def kill():
    capsule.destroy()


FEATURES = {
    "create": lambda: None,
    "info": info,
    "run a command": run,
    "files": files,
    "pause and connect": pause_and_connect,
    "metrics": metrics,
    "kill": kill,
}
for name, feature in FEATURES.items():
    try:
        feature()
        outcome = "works"
    except Exception:
        outcome = traceback.format_exc()
    print(json.dumps({"feature": name, "outcome": outcome}), flush=True)
