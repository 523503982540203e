"""One of two processes that train as a small GPU has to: each of the runs below."""

from micro import one_process_of_two, run

# Settings of each run; every one makes batches of four.
RUNS = {
    "fp8": {"base_precision": "fp8"},
    "int8": {"base_precision": "int8", "split_pair": True},
    "nf4": {"base_precision": "nf4", "cache_reference": 3, "beta_audio": 10.0},
    "blocks": {"offload": "blocks", "gradient_checkpointing": True, "optimizer": "adamw8bit"},
    "nf4-blocks": {
        "base_precision": "nf4",
        "offload": "blocks",
        "gradient_checkpointing": True,
        "lora_rank": 128,  # whose moments are large enough for 8 bits
        "optimizer": "adamw8bit",
    },
}


def train_one(name, folder, **settings):
    return run(folder / name, **{"lora_rank": 2, "steps": 8} | RUNS[name] | settings)


def one_of_two(rank, port, folder):
    with one_process_of_two(rank, port):
        for name in RUNS:
            train_one(name, folder, batch_size=2)
