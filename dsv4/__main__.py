"""`python -m dsv4`."""

from dsv4.cli.main import console

if __name__ == "__main__":
    console()
