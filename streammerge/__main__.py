"""`python -m streammerge`, the same program as `streammerge`."""

from streammerge.cli.main import run

if __name__ == "__main__":
    run()
