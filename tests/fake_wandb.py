"""What the tracker uses of the package wandb, for programs in processes of their own; it keeps nothing."""


class errors:
    class Error(Exception):
        pass


class Settings:
    def __init__(self, **options):
        pass


class Video:
    def __init__(self, path, format):
        pass


class Image:
    def __init__(self, path):
        pass


class _Run:
    def define_metric(self, *names, **options):
        pass

    def log(self, line):
        pass

    def finish(self):
        pass


def init(**options):
    return _Run()
