"""Start the command line: `python -m tune` and the script `reid-tune`."""

from reid_train.ray_utils import prepare_ray
from tune.cli import main as command_line


def main() -> int:
    """Run the command line; return its exit code."""
    prepare_ray()  # before anything imports Ray
    return command_line()


if __name__ == "__main__":
    raise SystemExit(main())
