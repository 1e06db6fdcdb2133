"""Write people.csv from photos/PERSON/CAMERA_NUMBER.jpg (or .png): `python make_csv.py`."""

import csv
from pathlib import Path

folders = sorted(folder for folder in Path("photos").iterdir() if folder.is_dir())
train = len(folders) * 2 // 3  # the other people are for the test

with open("people.csv", "w", newline="", encoding="utf-8") as file:
    table = csv.writer(file)
    table.writerow(["path", "pid", "camid", "split"])
    for number, folder in enumerate(folders):
        files = (f for f in folder.iterdir() if f.suffix.lower() in {".jpg", ".jpeg", ".png"})
        for place, photo in enumerate(sorted(files)):
            camera = photo.name.partition("_")[0]
            split = "train" if number < train else "query" if place == 0 else "gallery"
            table.writerow([photo.as_posix(), folder.name, camera, split])
