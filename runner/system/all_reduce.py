"""The all-reduce test of `runner doctor`: each process contributes its rank, and rank 0 prints the sum."""

import os


def main() -> None:
    """Entry point of `python -m runner.system.all_reduce`, under `accelerate launch`."""
    import torch
    from accelerate import Accelerator

    accelerator = Accelerator()
    rank = torch.tensor(float(accelerator.process_index), device=accelerator.device)
    total = accelerator.reduce(rank, "sum")
    if accelerator.is_main_process:
        print(f"sum {int(total)}", flush=True)
    torch.distributed.destroy_process_group()
    os._exit(0)  # see runner.training.session


if __name__ == "__main__":
    main()
