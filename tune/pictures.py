"""stub"""


def draw(folder, trials, entries, base, space, storage):
    pass
