"Run records that nobody has trained, for tests of what reads and writes them."


def outcome(loss=0.5, **changes):
    "What training a run returns, as small as it can be."
    return {
        "status": "finished",
        "best": {"val_loss": loss, "accuracy": 0.5},
        "final": {"val_loss": loss, "accuracy": 0.5},
        "extra": {},
        "history": [
            {"step": 0, "seconds": 0.0, "train_loss": None, "val_loss": 2.5, "accuracy": 0.1},
            {"step": 240, "seconds": 2.0, "train_loss": 0.4, "val_loss": loss, "accuracy": 0.5},
        ],
        "seconds": 2.0,
        "ms_per_step": {"median": 9.0, "low": 8.0, "high": 10.0},
        "state_bytes": 40,
        "parameters": 10,
        "trained": 10,
        "environment": {"threads": 1},
        **changes,
    }
