"""One-file module that makes `python -m celeriac` and `celery -A celeriac` work."""

if __name__ == "__main__":
    from compose.cli import main

    main()
else:
    from tasks.app import app as app
