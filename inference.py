"""Upscale pictures with a trained generator, score the result, draw comparisons; exit status 1: some failed, 2: all.

    python inference.py                                  # a few sample faces: what this project does
    python inference.py FOLDER photo.png                 # upscale files and folders into results/
    python inference.py party.jpg --photo                # find the faces in photographs and restore them
    python inference.py HR_FOLDER --simulate             # reduce the pictures first, then score the results
    python inference.py --ui [--study HR_FOLDER]         # all that in a browser, with a blind study
"""
import argparse
import contextlib
import functools
import hashlib
import os
import shutil
import signal
import sys
import tempfile
import time
import zipfile
from collections import defaultdict
from concurrent.futures import CancelledError, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from tqdm import tqdm

from data_loader import (DAMAGES, FACE_SIZE, KERNELS, DataError, choose_output, find_faces, find_images, find_inputs,
                         is_result, open_image, printable, read_image, rescale, simulate, write_picture)
from loss import (FACES, FRAME, STUDY_KEYS, STUDY_STYLE, Study, added_detail, aimed, build_study, captioned_pairs,
                  compare, fit, load_lpips, photo_rows, photo_sentence, photo_table, plot_comparison, pointed, report,
                  report_study, result_sentence, sample_faces, write_csv)
from model import (CUDA_FULL, INVENTED, POOR, PRECISIONS, PRECISION_HELP, TINY, CheckpointError, Found, Networks,
                   Picture, UsageError, enlargement, locked, read_extras, restore_photos, select_device, shown_share,
                   upscale_pictures, upscale_reduced, write_result, write_results)

CHECKPOINT = Path(__file__).resolve().parent / "checkpoints" / "srgan_x4.pth"
SHOWN, RESULT_LIMIT = 12, 400_000_000       # pictures in the figure; pixels of a result, each some 8 bytes, of noise 13


# The command ----------------------------------------------------------------------------------

def read_pictures(args, files, scale, taken, failed):
    """Yield a Picture for each input file that can be used; report the others to `failed`."""
    truths = {path.relative_to(args.hr).with_suffix(""): path for path in (find_images(args.hr) if args.hr else ())}
    if not args.inputs:
        for name, face in sample_faces().items():
            lr, hr = simulate(face, scale, args.kernel, args.damage)
            yield Picture(name, choose_output(Path(name), args.output, taken), lr, hr=hr)
    told = [""]
    for path, relative in files:
        try:
            (lr, alpha), hr, sr = read_image(path), None, None
            if args.simulate:
                (lr, hr), alpha = simulate(lr, scale, args.kernel, args.damage), None
            elif args.hr:
                if (truth := truths.get(relative.with_suffix(""))) is None:
                    if is_result(path) and path.name.startswith("comparison"):
                        continue
                    raise DataError(f"{path}: no ground truth of this name in {args.hr}, so left out")
                hr = read_image(truth)[0]
                if hr.shape == lr.shape:        # a result already
                    sr, (lr, hr) = lr, simulate(hr, scale, args.kernel, args.damage)
                    sr = sr[:len(hr), :len(hr[0])]
                elif hr.shape[:2] != (lr.shape[0] * scale, lr.shape[1] * scale):
                    raise DataError(f"{path}: {lr.shape[1]}x{lr.shape[0]} pixels, neither as many as {truth} has, "
                                    f"{hr.shape[1]}x{hr.shape[0]}, nor {scale} times fewer a side, so left out")
            factor = enlargement(lr, args.enlarge) if args.photo else scale
            height, width, side = *lr.shape[:2], max(lr.shape)
            if height * width * factor ** 2 > RESULT_LIMIT:
                raise DataError(f"{path}: {width}x{height} pixels, too many to enlarge {factor} times: the result may "
                                f"have {RESULT_LIMIT:,}; use --{'enlarge 1' if args.photo else 'photo'}")
            given = args.photo or args.as_is or hr is not None      # what is scored is given as it is
            if not given and height * width > 2**20:        # some 20 s and more on a CPU
                raise DataError(f"{path}: {width}x{height} pixels are no single face: --photo finds those in it, "
                                "--as-is enlarges all of it by the network, which takes a while")
            output = choose_output(relative, args.output, taken, photo_suffix(path, alpha) if args.photo else ".png")
            name = printable(output.relative_to(args.output).with_suffix(output.suffix * args.photo))
            hint = f"more than {FACE_AT_MOST} pixels, taken for one face; --photo finds faces" * (side > FACE_AT_MOST) \
                or f"less than {TINY} pixels; --scale 8 is better for that" * (side < TINY and scale == 4)
            hint = f"{side} pixels: try without --photo" * (side <= FACE_AT_MOST) if args.photo else hint
            hint = hint if hr is None else f"{len(hr)} pixels; scores are given for {FACE_SIZE}" * (len(hr) != FACE_SIZE)
            if hint not in told:        # before it takes its time; once is enough
                told.append(hint)
                tqdm.write(f"hint: {name} has {hint}")
            wishes = [(n, "left") for n in args.leave] + [(n, "restored") for n in args.restore]
            faces, share = find_faces(lr) if wishes else None, 1 if given else shown_share(lr)
            if not all(0 < number <= len(faces) for number, _ in wishes):
                raise DataError(f"{path}: --leave and --restore take numbers from 1 to {len(faces)}, the faces found")
            marked = [(faces[number - 1], wish) for number, wish in wishes]
            yield Picture(name, output, lr, alpha, hr, sr, share, Found(faces), marked=marked, extras=read_extras(path))
        except (DataError, OSError, MemoryError) as error:
            failed(str(error) if str(path) in str(error) else f"{path}: {str(error) or 'not enough memory'}")


def photo_suffix(path, alpha):
    """A photograph that came as a JPEG or HEIC becomes a JPEG: a PNG would take several times its space."""
    return ".jpg" if path.suffix.lower() in (".jpg", ".jpeg", ".heic", ".heif") and alpha is None else ".png"


def main(args):
    """Carry out the command; return the exit status: 0 all done, 1 some failed, 2 nothing done."""
    if args.study_report or args.ui:
        return report_study(args.study_report, args.output) if args.study_report else serve(args)
    started, problems = time.monotonic(), []

    def failed(sentence):
        problems.append(sentence)
        tqdm.write(f"inference.py: {sentence}", file=sys.stderr)

    device = select_device(args.device)
    files, bad_inputs = find_inputs(args.inputs, args.output, results=bool(args.hr))
    for sentence in bad_inputs:
        failed(sentence)
    if args.inputs and not files:
        return 2
    networks = Networks(args.checkpoint, device, args.precision)
    strength = args.strength if args.strength is not None else networks.usual if args.photo else 1
    generator, faithful = networks(strength), networks(0) if args.added else None
    if args.scale not in (None, generator.scale):
        tqdm.write(f"warning: {args.checkpoint} enlarges {generator.scale} times, whatever --scale says", sys.stderr)
    lpips = load_lpips(device) if args.lpips else None
    args.output.mkdir(parents=True, exist_ok=True)
    scores, sheet, faces, taken, done, finished, blurred = {}, {}, [], set(), 0, 0, 0
    comparison, table = (choose_output(Path(name), args.output, taken, suffix) for name, suffix in (
        ("comparison", ".png"), ("faces" if args.photo else "metrics", ".csv")))
    pictures = read_pictures(args, files, generator.scale, taken, failed)
    if args.photo:
        results = restore_photos(networks, pictures, args.batch_size, strength, args.enlarge, args.background)
    else:
        results = upscale_pictures(generator, pictures, args.batch_size, networks.tiny(strength), networks())
    for picture, sr, writing in tqdm(write_results(results), "upscaling", len(files) or None, unit="picture",
                                     leave=False, disable=None):
        line, show = {}, len(sheet) < SHOWN
        rows = photo_rows(picture, sr) if args.photo and show else []
        if not args.photo and (picture.hr is not None or show):
            added = added_detail(upscale_reduced(faithful, picture.lr, picture.share, networks.tiny(0), networks()),
                                 sr) if show and faithful else None
            row, line = compare(picture, sr, added, args.kernel, lpips)
            rows = [row]
        try:
            writing.result()
        except OSError as error:
            failed(f"{picture.output}: cannot be written ({error.strerror})")
            continue
        done, finished, blurred = done + 1, finished + (picture.sr is not None), blurred + (picture.share < 1)
        if args.photo:
            tqdm.write(f"{picture.name}: {photo_sentence(picture, sr)}")
            faces += photo_table(picture)
        scores |= {picture.name: line} if line else {}
        sheet |= {picture.name: rows} if show else {}
    try:
        if scores:
            sha = hashlib.sha256(args.checkpoint.read_bytes()).hexdigest()[:8]
            made = f"{args.checkpoint.name} {sha}; strength {strength:g}; {generator.head[0].weight.dtype}"
            report(scores, table, f"{'as given' if finished == done else made}; {args.kernel}; damage {args.damage}")
        if faces:
            write_csv(table, FACES, faces)
        if sheet:
            note = f"{len(sheet)} of {done} shown, " * (len(sheet) < done) + f"strength {strength:g}" * (strength < 1)
            plot_comparison(comparison, [row for name in sorted(sheet) for row in sheet[name]], note.removesuffix(", "))
    except OSError as error:
        failed(f"{error.filename or args.output}: cannot be written ({error.strerror})")
        sheet = {}
    if args.hr and len(scores) < (number := len(find_images(args.hr))):
        print(f"hint: {len(scores)} of the {number} pictures in {args.hr} count in the means")
    deed = "scored as results of" if finished else "upscaled"
    what, how = ("photograph", "") if args.photo else ("picture", f" {deed} {generator.scale}x")
    how += f" ({blurred} blurred, so reduced first to what they show, but --as-is)" * bool(blurred)
    print(f"{done} {what}{'s' * (done != 1)}{how} into {args.output} in {time.monotonic() - started:.1f} s on the "
          f"{device.type}" + f"; compare: {comparison}" * bool(sheet) + "; is a face missing? See --ui" * args.photo)
    return 2 if not done else 1 if problems else 0


# The interface ----------------------------------------------------------------------------------

LARGEST, PHOTOGRAPH = 16_000_000, 32_000_000        # pixels of what the network gives, and of a photograph: 30 s
FACE_AT_MOST, SHARP_FROM, SCREEN = 64, 80, 2048     # pixels a side: more is a photograph; less not shrunk; the slider's
FILES, WAITING, KEPT = 200, 32, 10      # pictures in a folder; that one address waits for; minutes until all is deleted

INTRODUCTION = """# Face SRGAN
Give a small or blurred face, or a photograph with some, and see it sharp. **What is added is invented**: one
of many faces that fit, no evidence of who somebody is. Never identify anyone by it. Not for paid work."""
EXAMPLE = "An example: an astronaut from {0} x {0} pixels. Give a picture of your own to see it here instead."
DELETED = "**Your picture and its result have been deleted by now, as promised below. Give it again to see it again.**"
WORDS = f"""
- **Restored, sharp, small, left, failed**: what was done. *At 0.5*: its strength. *As sharp as 32*: as 32 good pixels,
  or less. *Mostly invented*: below {INVENTED} ({POOR} from a poor JPEG): maybe a stranger. *Doubtful*: hardly a face.
- **PSNR** (decibels), **SSIM** (at most 1): how near a result is to the truth. Sharp ones often have less."""
LOOK = "(...args) => (document.querySelector('#compare').scrollIntoView({block: 'nearest'}), args)"
NEXT = ("_ => document.querySelector('#faces :has(>.selected) + * img, "       # after the last comes the first
        "#faces:has(:last-child>.selected) .grid-container>*+* img').click()")
STAMP = "(...args) => (args[9] = Date.now(), args)"      # requests may overtake each other: the last wish counts
PRIVACY = f"""Your pictures stay on the computer that runs this page, in a temporary folder, and are deleted {KEPT}
minutes after you last worked on them, or when the program ends. Nothing is sent to anybody else."""
POLICY = b"default-src 'self' data: blob: 'unsafe-inline' 'unsafe-eval'"
STYLE = """
:root, .dark {--button-primary-background-fill: #9a3412; --button-primary-background-fill-hover: #7c2d12;
    --primary-600: #9a3412; --block-info-text-color: #52525b; --block-label-text-color: #3f3f46}
.dark {--block-info-text-color: #a1a1aa; --block-label-text-color: #d4d4d8} .caption-label {opacity: 1 !important}
main:not(:has(#compare label):has(#photo button):has(#knobs button):has(#rest button)) {visibility: hidden}
.pixels img {image-rendering: pixelated} .caption-label {white-space: normal !important; max-width: 100% !important}
:is(#photo, .below) img {width: 100% !important; height: 100% !important; object-fit: contain}
:is(#photo, .below, #compare:not(.fullscreen)) {padding-top: 28px !important} .fullscreen img {height: 96vh!important}
:is(#compare, .below):not(.fullscreen) .icon-button-wrapper {top: -28px} #compare.fullscreen {height: 100% !important}
#work {display: grid; gap: 16px; grid-template: auto auto 1fr / minmax(300px, 1fr) minmax(0, 2fr)} #cancel {gap: 8px}
#show {grid-area: 1 / 2 / 4} #status {min-height: 3em} #cancel:disabled {display: none} .or {color: inherit !important}
#compare img {object-fit: contain !important} #compare:not(.fullscreen) img {max-height: min(450px, 84vw) !important}
:is(#faces, #pairs) .grid-container {grid-template-columns: repeat(auto-fill, minmax(220px, 1fr)) !important}
#faces button, #pairs button {aspect-ratio: 1.5; padding-bottom: 3.4em} label:has(:disabled) {opacity: .45}
:is(#faces, #pairs) .grid-wrap {padding-top: 2.4em; min-height: 0 !important; max-height: none !important}
:is(input, button, a, [tabindex]):focus-visible {outline: 3px solid #2563eb !important; outline-offset: 2px}
@media (max-width: 700px) {
    #work {display: flex} #show {display: contents} #give {order: -2} #status {order: -1; min-height: 3.6em}
    #status p, #intro p {font-size: .85em} #intro h1 {font-size: 1.4em} :is(#faces, #missed) {order: 1} #rest {order: 2}
    :is(#faces, #pairs) .grid-container {grid-template-columns: repeat(2, minmax(0, 1fr)) !important}
    #photo {height: 120px !important; min-height: 0 !important} #faces button {aspect-ratio: 1; padding-bottom: 4.6em}
    #cancel:enabled {position: fixed; bottom: 1em; right: 1em; z-index: 9} #cancel:enabled::before {content: "Working …"}
    #compare:not(.fullscreen) {height: calc(84vw + 30px) !important} .caption-label {font-size: 10px !important}}"""
KEYS = """<script>      // what Gradio's slider, which knows the mouse alone, lacks; alternative texts
document.addEventListener("keydown", event => {
    if (event.ctrlKey || event.altKey || event.metaKey || event.target.closest("input, textarea")) return;
    const line = event.target.closest("[data-testid=slider]");
    const step = {ArrowLeft: -16, ArrowRight: 16, Home: -1e4, End: 1e4}[event.key];
    if (line && step) {
        const {x, y, width} = line.getBoundingClientRect(), centre = x + width / 2;
        const image = line.closest("#compare").querySelector("img"), box = image.getBoundingClientRect();
        const half = Math.min(box.width, box.height * image.naturalWidth / image.naturalHeight) / 2;
        const middle = box.left + box.width / 2, end = Math.min(Math.max(centre + step, middle - half), middle + half);
        for (const [type, place] of [["mousedown", centre], ["mousemove", end], ["mouseup", end]])
            (type == "mousedown" ? line : window).dispatchEvent(new MouseEvent(
                type, {clientX: place, clientY: y + 9, view: window, bubbles: true}));
        line.setAttribute("aria-valuenow", Math.round(50 + 50 * (end - middle) / half)); event.preventDefault();
    }
});
const each = (selector, act) => document.querySelectorAll(selector).forEach(act);
const name = (selector, names) => each(selector, element => { for (const key in names)
    if (element.getAttribute(key) != names[key]) element.setAttribute(key, names[key]); });
new MutationObserver(() => {
    each(".upload-container[aria-label], .empty[aria-label]", it => it.removeAttribute("aria-label"));      // misnomers
    each(".toast-message-text", it => it.textContent.includes("image/*") && (it.textContent = "This is no picture."));
    each(".caption-label", it => it.style.border = it.textContent.includes("doubtful") ? "3px solid red" : "");
    name("#compare [data-testid=slider]:not([tabindex])", {tabindex: 0, role: "separator", "aria-orientation":
        "vertical", "aria-valuenow": 50, "aria-label": "Line between blurry enlargement and ours: use the arrow keys"});
    name("#compare img", {alt: "The blurry enlargement and ours"}); name("#photo img", {alt: "Your picture"});
    name("#photo button:not([aria-label]):not(.upload-container)", {"aria-label": "Give a picture"});
}).observe(document, {childList: true, characterData: true, subtree: true});
for (const type of ["load", "error"]) addEventListener(type, ({target}) => {
    if (target.matches && target.matches("#photo img")) target.style.opacity = +(type == "load"); }, true);
addEventListener("unhandledrejection", ({reason}) => reason && reason.name == "NotAllowedError" &&
    alert("Your browser did not let this page use the clipboard or the camera: allow it, or choose a file."));
</script>"""


def only_this_host(app):
    """Wrap an ASGI app: the browser refuses all requests to another host, whatever Gradio's templates refer to."""
    async def wrapped(scope, receive, send):
        def with_policy(message):
            headers = [*message.get("headers", ()), (b"content-security-policy", POLICY)]
            return send(message | {"headers": headers} if message["type"] == "http.response.start" else message)
        await app(scope, receive, with_policy)
    return wrapped


class Workshop:
    """What the command does, for the interface. Results lie in `folder`; tiles are computed one at a time, in turn."""

    def __init__(self, args, folder):
        self.args, self.folder, self.jobs, self.found = args, folder, {}, defaultdict(Found)
        self.hands, self.worker = ThreadPoolExecutor(16), ThreadPoolExecutor(1)
        self.last = functools.lru_cache(1000)(lambda _: SimpleNamespace(when=0, seen=0, moved=0, marks=[], shown=(0,)))
        self.known = functools.lru_cache(1)(lambda name: {})    # what the networks made of the last photograph
        self.device = select_device(args.device)
        self.networks = Networks(args.checkpoint, self.device, args.precision)
        self.files, self.scale, self.has_knob = self.networks.files, self.networks.scale, self.networks.has_knob
        self.strength = args.strength if args.strength is not None else self.networks.usual
        self.suited = lambda lr: self.networks.suited(max(lr.shape))[1]     # the enlargement for a picture of one face

    async def work(self, request, method, *arguments, when=0):
        """Carry out method(job, *arguments) in a thread: yield what it is at from time to time, at the end its result,
        or None where it was cancelled. Given up is what the page asked before `when`, and what a closed page asked."""
        import asyncio      # of no use to the command, which starts sooner without
        page, folder, started = request.session_hash, method == self.enlarge_all, time.monotonic()
        job = SimpleNamespace(host=request.client.host, gone=False, over=False, text="Working", part="")

        def run():
            with contextlib.suppress(CancelledError):
                return method(job, *arguments)

        if when and when < self.last(page).when:
            yield None          # without any answer, Gradio would blank the page
            return
        self.last(page).when = when or self.last(page).when
        vars(self.jobs.pop((page, folder), SimpleNamespace())).update(over=True, gone=True)
        if sum(other.host == job.host for other in self.jobs.values()) >= WAITING:
            raise DataError(f"{WAITING} pictures from your address are waiting already; try again later")
        self.jobs[page, folder] = job
        done = asyncio.get_running_loop().run_in_executor(self.hands, run)
        try:
            while not (await asyncio.wait([done], timeout=0.5))[0] and not job.gone:
                yield f"{job.text}{job.part}: {time.monotonic() - started:.0f} s …"
            yield None if job.gone else done.result()       # given up: the thread sees it before its next tile
        finally:
            job.gone = job.over = True
            if self.jobs.get((page, folder)) is job:
                del self.jobs[page, folder]

    def cancel(self, page, folder=False):
        """End what a page waits for, at once or, of a folder, with what is done by then; return whether it waits."""
        if job := self.jobs.get((page, True)) if folder else self.jobs.pop((page, False), None):
            job.over, job.gone = True, not folder
        return job is not None

    def sweep(self, kept, age=KEPT * 60):
        """Delete what is older than `age` seconds and not among the paths `kept`; Gradio's own way dies under load."""
        for parent, _, files in os.walk(self.folder):
            for path in (os.path.join(parent, name) for name in files):
                with contextlib.suppress(OSError):
                    if path not in kept and os.stat(path).st_mtime < time.time() - age:
                        os.unlink(path)
                        self.found.pop(Path(path), None)
                        self.known.cache_clear()

    def restore(self, job, picture, strength, photo, scale, faces_only=False):
        """Upscale a Picture, or restore the faces of a photograph; its name becomes that of the file for the result."""
        if not isinstance(strength, (int, float)) or not 0 <= strength <= 1:
            raise UsageError("Strength is a number from 0 to 1")
        networks = self.networks.at_work(job or SimpleNamespace(over=False), self.worker, self.known(picture.name))
        path, background, tiny = Path(picture.name), "bicubic" if faces_only else None, networks.tiny(strength)
        if photo:
            sr = next(restore_photos(networks, [picture], self.args.batch_size, strength, None, background))[1]
        else:
            picture.share = shown_share(picture.lr) if picture.hr is None else 1
            sr = upscale_reduced(networks(strength, scale), picture.lr, picture.share, tiny, networks(1, scale))
        deed = "restored" if any(p.action == "restored" for p in picture.patches) else f"x{len(sr) // len(picture.lr)}"
        picture.name = f"{path.stem}_{deed}{photo_suffix(path, picture.alpha) if photo else '.png'}"
        return sr

    def read(self, path, scale=1, shrink=False, whole=False):
        """Read an upload as a Picture; nothing else of this machine, whatever a request names. Raises DataError."""
        if not path.resolve().is_relative_to(self.folder.resolve()):
            raise DataError("This picture was not uploaded here")
        if not path.is_file():
            raise DataError(f"{path.name} has been deleted by now, as promised below; please give it again")
        os.utime(path)      # who works on it keeps it
        limit = LARGEST // scale ** 2 if whole and not shrink else PHOTOGRAPH
        try:
            with open_image(path) as image:
                width, height = image.size
            if width * height > limit:
                hint = " for one face: cut it out, or" * (whole and not shrink) or ";"
                raise DataError(f"{path} has {width} x {height} pixels; the limit is {limit:,}{hint} reduce it first")
            (lr, alpha), hr = read_image(path), None
            if shrink and min(width, height) < SHARP_FROM:
                raise DataError(f"{path} is only {width} x {height} pixels: leave out “shrink it first”")
            if shrink:
                (lr, hr), alpha = simulate(lr, scale, self.args.kernel, self.args.damage), None
        except DataError as error:
            raise DataError(str(error).replace(str(path), path.name)) from None
        return Picture(path.name, None, lr, alpha, hr, found=self.found[path], extras=read_extras(path))

    def enlarge(self, job, path, strength, shrink, added, whole, scale, marked=(), faces_only=False):
        """Upscale one upload: a namespace of the file to download, the files of the slider (bicubic and ours, to fit a
        screen), LR, truth and what was invented, or None, a photograph's faces with captions, and a line about it."""
        folder = Path(tempfile.mkdtemp(dir=self.folder))
        picture = replace(self.read(path, scale, shrink, whole), marked=marked)
        photo = not whole and not shrink and bool(max(picture.lr.shape) > FACE_AT_MOST or marked)
        sr = self.restore(job, picture, strength, photo, scale, faces_only)
        factor, picture.output, picture.name = len(sr) // len(picture.lr), folder / picture.name, path.name
        write_result(picture, sr)
        bicubic, scores = rescale(picture.lr, factor), {} if picture.hr is None else compare(picture, sr)[1]
        plain = [(face, wish if isinstance(wish, str) else "restored") for face, wish in marked]
        faithful = added and self.restore(job, replace(picture, marked=plain), 0, photo, scale, faces_only)
        invented = fit(added_detail(faithful, sr), SCREEN) if added else None
        pair = [folder / "bicubic.png", picture.output]
        if max(sr.shape) > SCREEN:
            pair[1], picture.alpha = folder / "screen.png", None
            write_result(replace(picture, output=pair[1]), fit(sr, SCREEN))
        write_result(replace(picture, output=pair[0]), fit(bicubic, SCREEN))
        line = result_sentence(picture, sr, photo, scores, self.suited(picture.lr))
        return SimpleNamespace(
            file=str(picture.output), pair=tuple(map(str, pair)), hr=picture.hr, photo=photo, invented=invented,
            lr=None if picture.hr is None else picture.lr, faces=captioned_pairs(picture, sr), line=line,
            found={str(path): [patch.face for patch in picture.patches]}, marked=photo and marked,
            strengths=[None, *({"restored": p.strength, "small": None}.get(p.action, False) for p in picture.patches)])

    def enlarge_all(self, job, paths, strength):
        """Upscale many uploads, each as its size asks: (pairs bicubic | ours with their names, photographs followed by
        their faces; ZIP or None; lines about them and what is unreadable)."""
        folder, taken, pairs, faces, notes = Path(tempfile.mkdtemp(dir=self.folder)), set(), [], [], []
        with zipfile.ZipFile(folder / "results.zip", "w") as pack:
            for number, path in enumerate(paths, 1):
                job.text, job.part = f"Picture {number} of {len(paths)}", ""
                try:
                    if job.over:        # a sharp photograph does not come to the network, which sees it otherwise
                        raise CancelledError(f"{path.name}: not done")
                    picture = self.read(path)
                    photo = max(picture.lr.shape) > FACE_AT_MOST
                    sr = self.restore(job, picture, strength, photo, self.suited(picture.lr))
                    picture.output = choose_output(name := Path(picture.name), folder, taken, name.suffix)
                    picture.name = picture.output.name
                    write_result(picture, sr)
                    pack.write(picture.output, picture.output.name)
                    pair = np.hstack([rescale(picture.lr, len(sr) // len(picture.lr)), sr])
                    write_picture(picture.output, fit(pair, 1024))      # the gallery shows no more
                    pairs += [(str(picture.output), path.name), *captioned_pairs(picture, sr, path.name)]
                    faces += photo_table(picture)
                    notes += [f"{path.name}: {photo_sentence(picture, sr)}"] * photo
                    notes += [f"{path.name}: mostly invented"] * (not photo and max(picture.lr.shape) < INVENTED)
                except (CancelledError, DataError, OSError) as error:
                    notes.append(str(error) or f"{path.name}: not done")
            done = len(pack.namelist())
            if faces:
                write_csv(folder / "faces.csv", FACES, faces)
                pack.write(folder / "faces.csv", "faces.csv")
        return pairs, pack.filename if done else None, "\n- ".join([f"{done} of {len(paths)} done.", *notes])


def build_app(workshop, study):
    """Build the page, a gr.Blocks; `study` is a Study or None."""
    import gradio as gr
    # The file as it is: read_image says what is wrong with it. On the class, since Gradio makes the object anew.
    gr.Image.preprocess = lambda self, payload: payload and payload.path
    gr.Slider.preprocess = lambda self, value: value        # any number may be typed

    async def upscale_one(photo, strength, shrink, added, whole, scale, only, marks, found, when, request: gr.Request):
        path, marked = Path(photo or examples.get(scale, "")), [mark for where, *mark in marks if where == photo]
        before = {} if str(path) in found else shown(None)      # the result of another picture goes at once
        last, wish = workshop.last(request.session_hash), (photo, strength, shrink, added, whole, scale, only, marks)
        if when and when >= last.when and last.shown == wish:       # moved back to what is there
            last.when, _ = when, workshop.cancel(request.session_hash)
            yield ready(last) | {status: last.line}
            return
        try:
            async for result in workshop.work(
                    request, workshop.enlarge, path, strength, shrink, added, whole, scale, marked, only, when=when):
                if result is None:      # given up: a newer one shows something
                    yield {cancel: gr.Button(interactive=False)}
                elif isinstance(result, str):
                    last.shown = not before and last.shown
                    yield before | ready(last, busy=True) | {status: result}
                    before = {}
                else:
                    last.shown, last.line = wish, result.line if photo else EXAMPLE.format(FACE_SIZE // scale)
                    yield shown(result, last) | {status: last.line}
        except (UsageError, DataError, CheckpointError, OSError, MemoryError) as error:
            last.shown = isinstance(error, UsageError) and last.shown
            yield (ready(last) if last.shown else shown(None)) | {status: f"**{error or 'Out of memory'}**"}

    def ready(last, busy=False):
        return {cancel: gr.update(interactive=busy), download: gr.update(interactive=bool(last.shown) and not busy)}

    def shown(result, last=SimpleNamespace(seen=None, moved=0)):
        """What the page shows of Workshop.enlarge's result, or None: all or the Face seen, whose knob may move."""
        absent = dict.fromkeys(("file", "pair", "lr", "hr", "invented", "photo"))
        result = result or SimpleNamespace(faces=[], found={}, line="", strengths=[None], marked=(), **absent)
        known = [None, *sum(result.found.values(), [])]
        face = known.index(last.seen) if last.seen in known else 0        # its number may be another now
        pair = np.hsplit(result.faces[face][0], 2) if face else result.pair
        pictures = {pixels: result.lr, truth: result.hr, invented: result.invented}
        return {box: gr.Image(picture, visible=picture is not None) for box, picture in pictures.items()} | {
            slider: pair and tuple(pair), status: result.line, **offered(result.strengths, face, result.marked),
            **({own: gr.skip()} if face and time.monotonic() - last.moved < 2 else {}),     # it may have moved on
            faces: gr.Gallery(result.faces, visible=bool(result.faces), selected_index=face or None),
            scale: gr.Radio(interactive=not result.photo), missed: gr.Accordion(visible=bool(result.photo)),
            clock: gr.Timer(active=bool(result.file)), cancel: gr.Button(interactive=False),
            download: gr.DownloadButton("Download photo" if result.photo else "Download", result.file,
                                        interactive=bool(result.file)),
            found: result.found, made: result.pair and (*result.pair, result.strengths, result.marked)}

    def stop(folder, request: gr.Request):
        waits, last = workshop.cancel(request.session_hash, folder), workshop.last(request.session_hash)
        text = "Cancelled." if folder or last.shown else "Cancelled. Move Strength, or give it again, to begin anew."
        vars(last).update({"moved": 0} | ({"line": text} if waits and not folder else {}))
        told = {report if folder else status: text if waits else gr.skip()}
        return told if folder or not waits else told | ready(last) | dict(zip(settings[1:8], (last.shown or ())[1:]))

    def notice_deletion(made, request: gr.Request):
        gone, last = made and not Path(made[1]).exists(), workshop.last(request.session_hash)
        last.shown = not gone and last.shown
        return (DELETED, gr.DownloadButton(interactive=False), gr.Timer(active=False)) if gone else gr.skip()

    def opened(path):
        with contextlib.suppress(DataError):
            return workshop.read(Path(path or "")).lr

    def draw(path, face, found):
        return None if (picture := opened(path)) is None else aimed(picture, face, found.get(path, []))

    def framed(picture, face):
        return gr.skip() if picture is None or not face else round(min(1, face.size / min(picture.shape[:2])), 3)

    def aim(path, share, found, event: gr.SelectData):
        picture = opened(path)
        face = gr.skip() if picture is None else pointed(picture, event.index, share, found.get(path, []))
        return face, framed(picture, face)

    def set_size(path, face, share):
        known = face and (picture := opened(path)) is not None
        return replace(face, size=float(np.clip(share or 0, 0.01, 1)) * min(picture.shape[:2])) if known else face

    def begin(path, request: gr.Request):
        picture = opened(path)      # the settings of the one before may not fit it
        vars(workshop.last(request.session_hash)).update(seen=None, shown=0)
        usual = workshop.strength, False, False, False, workshop.scale if picture is None else workshop.suited(picture)
        return *usual, "Working …", gr.DownloadButton(interactive=False), FRAME

    def look_at(path, made, found, event: gr.SelectData, request: gr.Request):
        pair, face = (opened(event.value["image"]["path"]), found[path][event.index - 1]) if event.index else [None] * 2
        vars(workshop.last(request.session_hash)).update(seen=face, moved=0)
        pair = made[:2] if pair is None else tuple(np.hsplit(pair, 2))      # the first is the photograph
        return {slider: pair, target: face, share: framed(opened(path), face), **offered(made[2], event.index, made[3])}

    def offered(strengths, face, marked):
        left = (now := strengths[face]) is False or now is None     # None: too small, or the whole photograph
        return {this: gr.Row(visible=bool(face or marked)), undo: gr.Button(interactive=bool(marked)),
                turn: gr.Button("Restore face" if left else "Leave as it was", visible=now is not None), own: gr.Slider(
                    value=now or 0, visible=not left and workshop.has_knob, label=f"Strength of face {face}")}

    def mark(wish, path, face, marks, request: gr.Request):
        last = workshop.last(request.session_hash)
        last.seen, last.moved = (face := face or last.seen), 0          # with the frame that it has now
        if wish.startswith("Undo"):
            return [m for m in marks if m is not [None, *(m for m in marks if m[0] == path)][-1]]
        own = ["restored", *(its for *what, its in marks if what == [path, face] and its != "left")][-1]
        wish = "left" if wish.startswith("Leave") else own
        return [*marks, (path, face, wish)] if face else gr.Info("Click a face in the picture first.") or marks

    def mark_strength(path, strength, marks, request: gr.Request):
        last, now = workshop.last(request.session_hash), time.monotonic()
        last.marks, last.moved = last.marks if now - last.moved < 2 else marks, now      # drawn: one step of Undo
        new = path, last.seen, min(1, max(0, strength or 0))
        return [*last.marks, new] if last.seen and new not in marks[-1:] else marks

    async def enlarge_all(files, strength, request: gr.Request):
        try:
            if not files or len(files) > FILES:
                raise UsageError(f"Choose 1 to {FILES} pictures first")
            async for result in workshop.work(request, workshop.enlarge_all, list(map(Path, files)), strength):
                busy = isinstance(result, str)
                result = [gr.skip(), gr.skip(), result] if busy else result or [gr.skip()] * 3
                yield *result, gr.Button(interactive=busy)
        except (DataError, CheckpointError, UsageError, OSError, MemoryError) as error:
            yield [], None, f"**{error or 'Not enough memory'}**", gr.Button(interactive=False)

    dial = functools.partial(gr.Slider, 0, 1, workshop.strength, step=0.05, label="Strength", buttons=[],
        interactive=workshop.has_knob, info="0: faithful, soft. 1: vivid, invented. Too sharp, too old? Move it left.")
    small = functools.partial(gr.Image, format="png", interactive=False, buttons=["fullscreen"], height=280,
                              visible=False, elem_classes="below")
    tries, people = {}, sample_faces()
    given = [(name, simulate(face, n)[0], False, n) for name, face in people.items() for n in sorted(workshop.files)]
    given += [(name, face, True, workshop.scale) for name, face in people.items()]
    blurred = rescale(rescale(np.hstack([*people.values()]), 0.34375), 32 / 11)
    for name, picture, sharp, n in [*given, ("two_blurred_faces", blurred, False, workshop.scale)]:
        write_picture(path := workshop.folder / f"{name}_{len(picture)}.png", picture)
        tries["{}, {} x {}".format(name.replace("_", " ").title(), *picture.shape[1::-1])] = [str(path), sharp, n]
    examples = {n: path for path, _, n in reversed(tries.values())}        # the first of each enlargement
    first = workshop.enlarge(None, Path(examples[workshop.scale]), workshop.strength, *[False] * 3, workshop.scale)
    with gr.Blocks(title="Face SRGAN", analytics_enabled=False) as app:
        gr.Markdown(INTRODUCTION, elem_id="intro")
        with gr.Tab("Upscale"), gr.Column(elem_id="work"):
            with gr.Column(elem_id="give"):
                photo = gr.Image(type="filepath", image_mode=None, format="png", label="Your picture", height=260,
                                 buttons=[], sources=["upload", "clipboard", "webcam"], elem_id="photo")
            with gr.Column(elem_id="show"):
                slider = gr.ImageSlider(first.pair, label="Blurry enlargement | ours: drag the line", height=480,
                                        format="png", interactive=False, elem_id="compare", buttons=["fullscreen"])
                status = gr.Markdown(EXAMPLE.format(FACE_SIZE // workshop.scale), elem_id="status")
                with gr.Row():
                    download = gr.DownloadButton("Download", first.file, variant="primary", min_width=160)
                    cancel = gr.Button("Cancel", interactive=False, scale=0, min_width=110, elem_id="cancel")
                with gr.Row(elem_id="more"):
                    pixels = small(label="The small picture", elem_classes=["below", "pixels"])
                    truth, invented = small(label="The truth"), small(label="What was invented")
                with gr.Row(visible=False, equal_height=True, elem_id="this") as this:
                    own = gr.Slider(0, 1, step=0.05, label="Strength of face", min_width=300, scale=2, buttons=[])
                    turn, undo, then = (gr.Button(t, size="md", min_width=99) for t in ("", "Undo change", "Next face"))
                faces = gr.Gallery(label="Before and after: click one", visible=False, object_fit="contain", buttons=[],
                                   format="png", interactive=False, allow_preview=False, elem_id="faces")
                with gr.Accordion("Was a face missed?", open=False, visible=False, elem_id="missed") as missed:
                    gr.Markdown("Click it here (or, if it has a number, above), set its frame, and restore it.")
                    view = gr.Image(interactive=False, format="png", show_label=False, buttons=["fullscreen"])
                    target, share = gr.State(), gr.Slider(0.01, 1, FRAME, step=0.005, label="Frame size", buttons=[])
                    point = gr.Button("Restore it")
            with gr.Column(elem_id="knobs"):
                strength = dial()
                with gr.Accordion("More", open=False):
                    scale = gr.Radio([(f"{scale}x", scale) for scale in sorted(workshop.files)], value=workshop.scale,
                                     label="Enlargement of one face", visible=len(workshop.files) > 1,
                                     info="Chosen by its size: 8x, for 12 to 17 pixels, invents nearly all.")
                    shrink = gr.Checkbox(label="This is already sharp: shrink it first",
                                         info="As one face. Then the truth is known, and shown beside the result.")
                    added = gr.Checkbox(label="Show what was invented", interactive=workshop.has_knob,
                                        info="The difference to the faithful result, around gray.")
                    whole = gr.Checkbox(label="Treat it as one face", info="Else, a large picture is a photograph.")
                    only = gr.Checkbox(label="Faces only", info="Of a photograph: the rest is only enlarged.")
            with gr.Column(elem_id="rest"):
                pick = gr.Examples([*tries.values()], [photo, shrink, scale], label="Or try", example_labels=[*tries])
                with gr.Accordion("What do the words mean?", open=False):
                    gr.Markdown(WORDS)
            marks, found, made = gr.State([]), gr.State(first.found), gr.State()
            when, clock = gr.Number(0, visible="hidden"), gr.Timer(20, active=False)
            at_once = dict(concurrency_limit=None, show_progress="hidden")
            hidden = dict(api_visibility="private", **at_once)
            settings = [photo, strength, shrink, added, whole, scale, only, marks, found, when]
            knob = [this, own, turn, undo, missed]
            boxes = [slider, pixels, truth, invented, faces, download, cancel, clock, made, found, scale, *knob, status]
            gr.on([strength.change, shrink.input, added.input, whole.input, scale.input, only.input, marks.change],
                  upscale_one, settings, boxes, trigger_mode="multiple", js=STAMP, api_name="upscale", **at_once)
            given = photo.input(begin, photo, [strength, shrink, whole, only, scale, status, download, share], **hidden)
            for settled in (given, pick.load_input_event):
                settled.then(upscale_one, settings, boxes, trigger_mode="multiple", js=STAMP, **hidden)
            cancel.click(stop, gr.State(), [status, download, cancel, *settings[1:8]], api_name="cancel", **at_once)
            clock.tick(notice_deletion, made, [status, download, clock], **hidden)
            photo.change(lambda: None, None, target, **hidden)
            faces.select(look_at, [photo, made, found], [slider, *knob, target, share], js=LOOK, **hidden)
            own.input(mark_strength, [photo, own, marks], marks, trigger_mode="always_last", **hidden)
            gr.on([photo.change, target.change, found.change], draw, [photo, target, found], view, **hidden)
            view.select(aim, [photo, share, found], [target, share], **hidden)
            then.click(None, js=NEXT)
            share.input(set_size, [photo, target, share], target, **hidden)
            for button, face in ((point, target), (turn, None), (undo, None)):
                button.click(mark, [button, photo, face or gr.State(), marks], marks, js=LOOK, **hidden)
        with gr.Tab("Folder"):
            files = gr.File(file_count="multiple", height=180, label=f"Up to {FILES} pictures, of 32 megapixels")
            same = dial()
            with gr.Row():
                go, end = gr.Button("Upscale all", variant="primary"), gr.Button("Cancel", interactive=False)
            report, archive = gr.Markdown(), gr.File(label="All results as one ZIP", interactive=False)
            gallery = gr.Gallery(label="Blurry enlargement (left) and ours (right)", object_fit="contain",
                                 interactive=False, buttons=[], elem_id="pairs")
            go.click(enlarge_all, [files, same], [gallery, archive, report, end], api_name="folder", **at_once)
            end.click(stop, gr.State(True), report, api_visibility="private", queue=False)
        if study:
            with gr.Tab("Study"):
                build_study(study, workshop.folder)
        gr.Markdown(PRIVACY)
    return app.queue(default_concurrency_limit=1, max_size=256)


def serve(args):
    """Start the interface and stay until it is stopped; return the exit status."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    for remains in Path(tempfile.gettempdir()).glob("face-srgan-*"):        # of processes that were killed
        with contextlib.suppress(OSError), locked(remains) as dead:
            dead and shutil.rmtree(remains)
    with tempfile.TemporaryDirectory(prefix="face-srgan-", ignore_cleanup_errors=True) as folder, locked(folder):
        os.environ.update(GRADIO_TEMP_DIR=folder, GRADIO_ANALYTICS_ENABLED="False")     # so uploads go with it
        try:
            import gradio as gr
            from starlette.middleware import Middleware
        except ImportError:
            raise UsageError("--ui needs Gradio: pip install -r requirements.txt") from None
        workshop = Workshop(args, Path(folder))
        app = build_app(workshop, args.study and Study(workshop.networks, args.study, args.output, args.seed))
        try:
            _, address, _ = app.launch(
                server_name=args.host, server_port=args.port, share=False, ssr_mode=False, quiet=True,
                auth=args.auth and tuple(args.auth.split(":", 1)), inbrowser=True, prevent_thread_lock=True,
                run_history=False, footer_links=[],
                theme=gr.themes.Default(font="system-ui", font_mono="ui-monospace"), css=STYLE + STUDY_STYLE,
                head=KEYS + STUDY_KEYS, max_file_size="50mb", app_kwargs={"middleware": [Middleware(only_this_host)]})
        except OSError:
            raise UsageError(f"--host {args.host} --port {args.port or '7860 to 7959'}: cannot listen there; "
                             "another program does, or the address is not this machine's") from None
        print(f"Face SRGAN is at {address} on the {workshop.device.type}; Ctrl-C ends it", flush=True)
        kept = {str(path) for path in Path(folder).rglob("*")}
        try:
            while True:
                workshop.sweep(kept)
                time.sleep(60)
        except KeyboardInterrupt:       # SIGTERM too
            shutil.rmtree(folder, ignore_errors=True)
            os._exit(130)               # a thread may be inside the network, which does not end gently


# Arguments --------------------------------------------------------------------------------------

def parse_arguments(argv=None):
    parser = argparse.ArgumentParser(prog="inference.py", description=__doc__.split("\n\n")[0])
    add, truth = parser.add_argument, parser.add_mutually_exclusive_group()
    add("inputs", nargs="*", metavar="INPUT", help="files and folders (recursively); without, a few sample faces")
    add("--output", type=Path, default=Path("results"), metavar="DIR", help="folder for the results [%(default)s]")
    truth.add_argument("--hr", type=Path, metavar="DIR", help="ground truth of the same names: score against it")
    truth.add_argument("--simulate", action="store_true", help="the inputs are HR: reduce them first")
    add("--kernel", default="bicubic", choices=list(KERNELS), help="how HR is reduced, or was, with --hr [%(default)s]")
    add("--damage", default="none", choices=list(DAMAGES), help="what else befalls it, or did, with --hr [%(default)s]")
    add("--scale", type=int, choices=[4, 8], help="enlargement: 8 is for faces of 12 to 17 pixels [4]")
    add("--checkpoint", type=Path, metavar="FILE", help="trained generator, of any scale [the shipped SRGAN]")
    add("--strength", type=float, help="0: faithful, as SRResNet; 1: vivid [1; with --photo and --ui 0.7]")
    add("--lpips", action="store_true", help="score LPIPS too, with --simulate or --hr; needs pip install lpips")
    add("--as-is", action="store_true", help="reduce no blurred picture first, and enlarge large ones too")
    add("--added", action="store_true", help="show in the comparison what was invented: the difference to strength 0")
    add("--photo", action="store_true", help="the inputs are photographs: find and restore their faces")
    add("--leave", type=int, nargs="+", default=[], metavar="N", help="numbers of faces to leave as they are")
    add("--restore", type=int, nargs="+", default=[], metavar="N", help="numbers of faces to restore in any case")
    add("--enlarge", type=int, choices=[1, 2, 4], help="of a photograph [4 up to 1 megapixel, 2 up to 4, else 1]")
    add("--background", choices=["network", "bicubic"], help="for the rest of a photograph [network if it is quick]")
    add("--device", default="auto", help="auto, cpu, cuda or cuda:N [%(default)s]")
    add("--precision", default="auto", choices=PRECISIONS, help=PRECISION_HELP)
    add("--batch-size", type=int, default=16, help="pictures of one size at a time [%(default)s]")
    add = parser.add_argument_group("in a browser").add_argument
    add("--ui", action="store_true", help="open the interface in a browser, on this machine only")
    add("--host", default="127.0.0.1", help="address to listen on; 0.0.0.0 lets others in [%(default)s]")
    add("--port", type=int, help="port to listen on [the first free one from 7860 on]")
    add("--auth", metavar="NAME:PASSWORD", help="let in only who knows both")
    add("--study", type=Path, metavar="DIR", help="HR faces for a blind study; ratings go to ratings.csv in --output")
    add("--seed", type=int, default=0, help="of the order in which a rater sees the pictures [%(default)s]")
    add("--study-report", type=Path, metavar="CSV", help="print the mean opinion scores of a study, and plot them")
    args = parser.parse_args(argv)
    args.checkpoint = args.checkpoint or CHECKPOINT.with_name(f"srgan_x{args.scale or 4}.pth")
    for wrong, sentence in (
            (args.photo and (not args.inputs or args.hr or args.simulate or args.added or args.as_is or args.scale),
             "--photo needs INPUT, and does not go with --scale, --simulate, --hr, --added or --as-is"),
            ((args.enlarge or args.background or args.leave or args.restore) and not args.photo,
             "--enlarge, --background, --leave and --restore need --photo"),
            (args.inputs and not args.simulate and not args.hr and (args.lpips or args.kernel != "bicubic"
             or args.damage != "none"), "--lpips, --kernel and --damage need --simulate or --hr"),
            (args.added and args.strength == 0, "--added shows the difference to --strength 0: leave that out"),
            (args.study and not args.ui, "--study needs --ui"),
            (args.ui and (args.inputs or args.hr or args.simulate), "--ui goes without INPUT, --hr and --simulate"),
            (args.auth is not None and not all(args.auth.partition(":")), "--auth is NAME:PASSWORD"),
            (args.port is not None and not 1 <= args.port <= 65535, "--port must be from 1 to 65535"),
            (not 0 <= args.seed <= 2**32, f"--seed must be from 0 to {2**32}"),
            (not 0 <= (args.strength or 0) <= 1, "--strength must be from 0 to 1"),
            (not 1 <= args.batch_size <= 65536, "--batch-size must be from 1 to 65536"),
            (args.hr and not (args.inputs and args.hr.is_dir()), f"--hr needs INPUT, and a folder: {args.hr}")):
        if wrong:
            raise UsageError(sentence)
    return args


def run(argv=None):
    """Run `main` and turn every expected failure into one sentence; return the exit status."""
    try:
        if hasattr(sys.stdout, "reconfigure"):
            sys.stdout.reconfigure(errors="backslashreplace")       # a name that it cannot show must not end the work
        return main(parse_arguments(argv))
    except (UsageError, CheckpointError, DataError, OSError, MemoryError, torch.OutOfMemoryError) as error:
        text = CUDA_FULL if isinstance(error, torch.OutOfMemoryError) else str(error) or "the memory is full"
        print(f"inference.py: {text}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(run())
