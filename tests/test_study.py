"""The blind study: its statistics against values computed by hand, its order, its file, its report."""

import csv
from collections import Counter

import numpy as np
import pytest
import torch
from PIL import Image

import inference
from data_loader import DataError, write_picture
from loss import (
    METHODS, RATINGS, Study, append_rating, krippendorff_alpha, mean_opinion_scores, read_ratings, study_order,
    study_results)

NAN = float("nan")
FACES = [f"{i}.png" for i in range(20)]


def write(path, ratings):
    """A file of ratings from (rater, face, method, repeat, rating)."""
    for index, (rater, face, method, repeat, rating) in enumerate(ratings):
        append_rating(path, (rater, 0, index, face, method, repeat, rating, "2026-01-01T00:00:00+00:00"))
    return path


def test_krippendorffs_own_example():
    """Four observers, twelve units, values missing: Krippendorff 2011, 0.849 for interval data."""
    ratings = [
        [1, 2, 3, 3, 2, 1, 4, 1, 2, NAN, NAN, NAN],
        [1, 2, 3, 3, 2, 2, 4, 1, 2, 5, NAN, 3],
        [NAN, 3, 3, 3, 2, 3, 4, 2, 2, 5, 1, NAN],
        [1, 2, 3, 3, 2, 4, 4, 1, 2, 5, 1, NAN],
    ]
    assert krippendorff_alpha(np.array(ratings)) == pytest.approx(0.849, abs=5e-4)


def test_agreement_by_hand():
    assert krippendorff_alpha(np.array([[1.0, 3, 5], [1, 3, 5]])) == 1
    # Items (1, 2) and (3, 4): each differs by 1, so D_o = 1; of the six pairs of 1, 2, 3, 4 the mean
    # squared difference is 20 / 6.
    assert krippendorff_alpha(np.array([[1.0, 3], [2, 4]])) == pytest.approx(1 - 6 / 20)
    assert krippendorff_alpha(np.array([[1.0, 2], [2, 1]])) == pytest.approx(1 - 1 / (4 / 6))
    for unknown in ([[1.0, 2, 3]], [[1.0, NAN], [NAN, 2]], [[3.0, 3], [3, 3]]):
        assert np.isnan(krippendorff_alpha(np.array(unknown)))


def test_mean_opinion_scores_by_hand():
    """The interval covers both: raters who differ, and faces that differ."""
    ratings = np.array([[[1.0, 5], [2, NAN]], [[3, 4], [NAN, 4]]])  # (raters, faces, methods)
    mean, low, high = mean_opinion_scores(ratings)
    assert mean == pytest.approx([2, 13 / 3]) and (low < mean).all() and (mean < high).all()
    # Two raters who answer 2 and 4 to everything: a draw of two raters gives 2, 3 or 4, with 1/4, 1/2, 1/4.
    raters = np.array([2.0, 4])[:, None, None].repeat(6, axis=1)
    # Two faces with 2 and 4 from everybody: the same for faces.
    for table in (raters, raters.transpose(1, 0, 2)):
        mean, low, high = mean_opinion_scores(table)
        assert (mean[0], low[0], high[0]) == (3, 2, 4)
    constant = mean_opinion_scores(np.full((3, 4, 1), 5.0))
    assert [part[0] for part in constant] == [5, 5, 5]
    never = mean_opinion_scores(np.array([[[1.0, NAN]]]))
    assert np.isnan(never[0][1]) and np.isnan(never[1][1]) and never[0][0] == 1


def test_the_interval_is_the_bootstraps():
    """100 faces, one rater: nearly the normal interval of the mean, 1.96 standard errors each way."""
    values = np.random.default_rng(0).normal(3, 0.8, (1, 100, 1))
    mean, low, high = (part[0] for part in mean_opinion_scores(values))
    error = values.std() / 10
    assert mean - low == pytest.approx(1.96 * error, rel=0.08)
    assert high - mean == pytest.approx(1.96 * error, rel=0.08)


def test_the_order_is_a_function_of_rater_and_seed():
    order = study_order("anna", 0, FACES)
    assert order == study_order("anna", 0, FACES)
    # Written down once: a later version must go on where a rater of this one has stopped.
    assert order[:3] == [("8.png", "SRResNet", 0), ("3.png", "original", 0), ("10.png", "SRGAN", 0)]
    assert order != study_order("bo", 0, FACES) != study_order("bo", 1, FACES)
    assert len(order) == 110
    once = Counter(shown[:2] for shown in order if not shown[2])
    assert once == Counter((face, method) for face in FACES for method in METHODS)
    again = [place for place, shown in enumerate(order) if shown[2]]
    assert len(again) == 10 and min(again) >= 50
    for place in again:
        assert (*order[place][:2], 0) in order[:50]
    assert again != list(range(again[0], again[0] + 10))  # mixed in, not in a row
    assert len(study_order("anna", 0, FACES[:1])) == 7


def test_ratings_survive_a_torn_line(tmp_path):
    two = [("anna", "a, b.png", "SRGAN", 0, 4), ("bo", "c.png", "nearest", 1, 2)]
    path = write(tmp_path / "new" / "ratings.csv", two)
    rows = read_ratings(path)
    assert list(rows[0]) == list(RATINGS) and rows[0]["face"] == "a, b.png" and rows[0]["rating"] == 4
    whole = path.read_bytes()
    for torn in (whole + b"anna,0,2,d.p", whole + b"anna,0,2,d.png,SRGAN,0,1"):
        path.write_bytes(torn)
        assert read_ratings(path) == rows
        append_rating(path, ("anna", 0, 2, "d.png", "SRGAN", 0, 5, "now"))
        assert read_ratings(path)[:2] == rows and read_ratings(path)[2]["rating"] == 5
        assert path.read_bytes().startswith(whole) and len(read_ratings(path)) == 3
    path.write_bytes(whole[:9])  # torn in the heading
    assert read_ratings(path) == []
    append_rating(path, ("anna", 0, 0, "d.png", "SRGAN", 0, 5, "now"))
    assert len(read_ratings(path)) == 1


def test_each_rating_is_on_the_disk_at_once(tmp_path, monkeypatch):
    synced = []
    monkeypatch.setattr("os.fsync", lambda file: synced.append((tmp_path / "r.csv").read_text()))
    append_rating(tmp_path / "r.csv", ("anna", 0, 0, "d.png", "SRGAN", 0, 5, "now"))
    assert synced == [",".join(RATINGS) + "\nanna,0,0,d.png,SRGAN,0,5,now\n"]


def test_results_by_hand(tmp_path):
    ratings = [
        ("anna", "1.png", "SRGAN", 0, 4),
        ("anna", "1.png", "bicubic", 0, 2),
        ("anna", "2.png", "SRGAN", 0, 5),
        ("bo", "1.png", "SRGAN", 0, 3),
        ("bo", "1.png", "bicubic", 0, 1),
        ("anna", "1.png", "SRGAN", 1, 2),  # repeats: 2 and 1 points apart
        ("bo", "1.png", "bicubic", 1, 2),
    ]
    lines, text = study_results(read_ratings(write(tmp_path / "r.csv", ratings)))
    assert [line[0] for line in lines] == ["bicubic", "SRGAN"]
    assert [line[1] for line in lines] == [1.5, 4] and [line[4] for line in lines] == [2, 3]
    assert all(np.isnan(low) and np.isnan(high) for _, _, low, high, _ in lines) and "too few" in text
    more = ratings[:5] + [(rater, "1.png", "SRGAN", 0, grade) for rater, grade in zip("cdefg", (1, 5, 2, 4, 3))]
    [_, (_, mean, low, high, _)] = study_results(read_ratings(write(tmp_path / "more.csv", more)))[0]
    assert 1 <= low < mean < high <= 5
    # Items with two ratings: (4, 3) and (2, 1). D_o = 1, D_e = 20 / 6 as above.
    assert "Raters: 2, faces: 2, ratings: 7" in text and "alpha: 1 is perfect, 0 is chance): 0.70" in text
    assert "1.50 points apart on average (2 repeats)" in text


def test_the_report(tmp_path, capsys):
    path = write(
        tmp_path / "r.csv",
        [(rater, face, method, 0, 1 + i) for rater in ("anna", "bo") for face in FACES[:3]
         for i, method in enumerate(METHODS)],
    )
    before = path.read_bytes()
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mean_opinion_scores.png").write_text("mine")
    assert inference.run(["--study-report", str(path), "--output", str(tmp_path / "out")]) == 0
    out = capsys.readouterr().out
    for i, method in enumerate(METHODS):
        line = next(line for line in out.splitlines() if method in line).replace("|", "")
        assert line.split() == [method, f"{1 + i:.2f}", f"{1 + i:.2f}", "to", f"{1 + i:.2f}", "6"]
    assert "chance): 1.00" in out and path.read_bytes() == before
    assert (tmp_path / "out" / "mean_opinion_scores.png").read_text() == "mine"
    assert np.array(Image.open(tmp_path / "out" / "mean_opinion_scores.png.png")).std() > 5


def test_mistakes_are_one_sentence_and_status_2(tmp_path, capsys):
    (tmp_path / "foreign.csv").write_text("a,b\n1,2\n")
    (tmp_path / "none.csv").write_text(",".join(RATINGS) + "\n")
    damaged = write(tmp_path / "damaged.csv", [("anna", "1.png", "SRGAN", 0, 4), ("anna", "1.png", "SRGAN", 0, 9)])
    for path, word in (
        (tmp_path / "absent.csv", "no such file"),
        (tmp_path / "foreign.csv", "not a file of ratings"),
        (tmp_path / "none.csv", "no ratings"),
        (damaged, "line 3"),
    ):
        assert inference.run(["--study-report", str(path), "--output", str(tmp_path)]) == 2
        error = capsys.readouterr().err
        assert word in error and len(error.strip().splitlines()) == 1, error


class FakeNetwork(torch.nn.Linear):
    """Marks what it was given: the study's pictures without a network."""

    scale = 4

    def __init__(self, strength):
        super().__init__(1, 1)
        self.level = (100 + strength) / 255

    def forward(self, lr):
        return torch.full((len(lr), 3, 128, 128), self.level)


@pytest.fixture
def study(faces, tmp_path):
    return Study(FakeNetwork, faces, tmp_path, 3)


def test_what_the_study_shows(study, faces):
    assert len(study.pictures) == 12 * 5 and len(study.faces) == 12
    name = study.faces[0]
    face = np.array(Image.open(faces / name))
    small = Image.fromarray(face).resize((32, 32), Image.Resampling.BICUBIC)
    assert np.array_equal(study.pictures[name, "original"], face)
    nearest = np.array(small.resize((128, 128), Image.Resampling.NEAREST)).astype(int)
    assert np.abs(study.pictures[name, "nearest"] - nearest).max() <= 1
    blurred = np.array(small.resize((128, 128), Image.Resampling.BICUBIC)).astype(int)
    assert np.abs(study.pictures[name, "bicubic"] - blurred).max() <= 3
    assert study.pictures[name, "SRResNet"].max() == 100 and study.pictures[name, "SRGAN"].min() == 101


def test_rating_resuming_and_finishing(study, faces, tmp_path):
    index, order = study.place("anna")
    assert index == 0 and order == study_order("anna", 3, study.faces)
    study.rate("anna", 0, 1)
    study.rate("anna", 0, 4)  # a slip, corrected
    study.rate("anna", 2, 1)  # a page left open
    study.rate("bo", 0, 2)
    again = Study(FakeNetwork, faces, tmp_path, 3)
    assert again.place("anna") == (1, order) and again.place("bo")[0] == 1 and again.place("cy")[0] == 0
    for index in range(1, 70):
        again.rate("anna", index, 1 + index % 5)
    assert again.place("anna")[0] == len(order) == 70
    again.rate("anna", 70, 5)
    again.rate("anna", 3, 5)  # long past
    rows = [row for row in read_ratings(tmp_path / "ratings.csv") if row["rater"] == "anna"]
    assert [(row["face"], row["method"], row["repeat"]) for row in rows] == order
    assert [row["rating"] for row in rows][:4] == [4, 2, 3, 4] and rows[0]["seed"] == 3
    with open(tmp_path / "ratings.csv", newline="") as file:  # nothing is lost
        assert [row["rating"] for row in csv.DictReader(file) if row["rater"] == "anna"][:3] == ["1", "4", "2"]
    with pytest.raises(DataError, match="name"):
        again.rate("", 0, 5)
    other = Study(FakeNetwork, faces, tmp_path, 4)
    assert other.place("anna")[0] == 0  # another seed, another study


def test_a_study_of_other_faces_does_not_go_on(study, tmp_path, faces):
    study.rate("anna", 0, 4)
    (tmp_path / "few").mkdir()
    for path in sorted(faces.iterdir())[:2]:
        (tmp_path / "few" / f"x{path.name}").write_bytes(path.read_bytes())
    (tmp_path / "few" / "broken.png").write_text("hello")
    write_picture(tmp_path / "few" / "result.png", np.zeros((128, 128, 3), np.uint8))      # of ours, so no original
    other = Study(FakeNetwork, tmp_path / "few", tmp_path, 3)
    assert len(other.faces) == 2
    with pytest.raises(DataError, match="anna"):
        other.place("anna")


def test_twenty_faces_spread_over_the_folder(tmp_path, faces):
    content = next(faces.iterdir()).read_bytes()
    for i in range(50):
        (tmp_path / f"{i:02d}.png").write_bytes(content)
    study = Study(FakeNetwork, tmp_path, tmp_path / "none", 0)
    assert len(study.faces) == 20 and study.faces[0] == "00.png" and study.faces[-1] >= "47.png"
