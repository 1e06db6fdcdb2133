"""Start the command line: `python -m reid_train` and the script `reid-train`."""

from data_shards.ray_utils import prepare_ray
from reid_train.cli import main as command_line


def main() -> int:
    """Run the command line; return its exit code."""
    prepare_ray()  # before anything imports Ray
    return command_line()


if __name__ == "__main__":
    raise SystemExit(main())
