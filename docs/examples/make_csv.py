"""Write people.csv from photos/PERSON/CAMERA_NUMBER.jpg: `python make_csv.py`."""

import csv
from pathlib import Path

folders = sorted(folder for folder in Path("photos").iterdir() if folder.is_dir())
train = len(folders) * 2 // 3  # the other people are for the test

with open("people.csv", "w", newline="", encoding="utf-8") as file:
    table = csv.writer(file)
    table.writerow(["path", "pid", "camid", "split"])
    for number, folder in enumerate(folders):
        for place, photo in enumerate(sorted(folder.glob("*.jpg"))):
            camera = photo.name.partition("_")[0]
            split = "train" if number < train else "query" if place == 0 else "gallery"
            table.writerow([photo.as_posix(), folder.name, camera, split])
