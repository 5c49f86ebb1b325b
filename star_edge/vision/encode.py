"""Encodes the images of a prompt: whole, or without what need not be computed.

    pixels -> redundant units are left out -> layers [0, M) -> the encoder stage chooses -> layers [M, L) -> tokens

A unit is the square of patches that becomes one image token. Both ways to compute less leave units out, and the tokens
that stay have the mass of those that do not.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace

import numpy as np

from ..errors import EngineError
from ..llamacpp.mtmd import MEDIA_MARKER
from ..llamacpp.names import PIXELS
from ..llamacpp.tap import Compare, Plan
from ..pruning.blas import spread
from ..pruning.choose import Candidates, at_once, choose, divide, encoder_policy, prepare
from ..pruning.config import PruneConfig
from ..pruning.scorers import VISION_SCORERS
from ..pruning.selection import Selection, Tokens
from ..stopwatch import Stopwatch
from .cache import CachedImage
from .chunks import Compared, Encoded, ImageChunk, LooksKnownError, cells_of
from .composed import Composer, Picture, UnitFeatures, find_geometry
from .encoder import VisionEncoder
from .profiles import PROFILES
from .redundancy import masses, representatives, with_more
from .row_window import find_row_window
from .stage import PromptPlan
from .window import EncoderWindow, FirstPass, find_window, window_layer


@dataclass
class _Work:
    """An image that is not encoded whole, or not in one pass.

    Attributes:
        number: Its index among the prompt's images.
        units: Units that enter the encoder, ascending.
        mass: Units that each stands for, (n,) float64.
        picture: What the encoder gets of these units, until it has it. None: all units enter.
    """

    number: int
    units: np.ndarray
    mass: np.ndarray
    picture: Picture | None = None


class ImageEncoding:
    """Encodes the images of prompts with one encoder."""

    def __init__(self, encoder: VisionEncoder) -> None:
        self.encoder = encoder
        self.image = 0  # index among the prompt's images of the one in the encoder
        geometry = find_geometry(encoder)
        self.composer = None if geometry is None else Composer(encoder, geometry)
        self.window: EncoderWindow | None = find_window(encoder) or find_row_window(encoder)

    def possible(self, config: PruneConfig, images: Sequence[ImageChunk]) -> tuple[PruneConfig, list[str]]:
        """The config without what this encoder cannot do, and a note on each such thing.

        Raises:
            ConfigError: The encoder has no such layer.
        """
        notes = []
        if config.redundancy != "off" and self.composer is None:
            if config.redundancy != "auto":
                whole = self._reason("encodes whole pictures only")
                notes.append(f"no tokens are left out before the encoder: {whole}")
            config = replace(config, redundancy="off")
        if config.prunes_in_encoder:
            if self.window is not None:
                window_layer(self.window, config.encoder_layer)
            problem = next((p for image in images if (p := self.problem(image))), "")
            if problem:
                if not config.encoder_adapts:  # as far as model and picture allow is what that stage promises
                    notes.append(f"no encoder stage: {problem}")
                config = replace(config, encoder_keep=1.0, encoder_layer=None, encoder_tolerance=None)
        return config, notes

    def entering(self, config: PruneConfig) -> Callable[[np.ndarray], int] | None:
        """Counts the tokens of a picture, (h, w, 3) uint8, that enter the encoder. None: all of any picture do.

        What it counts is looked at, and not encoded. It raises ImageError if the encoder cannot take the picture.
        """
        if config.redundancy == "off" or self.composer is None:
            return None

        def count(pixels: np.ndarray) -> int:
            prompt = self.encoder.tokenize(MEDIA_MARKER, [pixels])
            try:
                images = [chunk for chunk in prompt.chunks if isinstance(chunk, ImageChunk)]
                works = [self._units(i, image, config, []) for i, image in enumerate(images)]
                return sum(image.n_tokens if work is None else len(work.units) for image, work in zip(images, works))
            finally:
                prompt.close()

        return count

    def problem(self, image: ImageChunk) -> str:
        """Why there can be no encoder stage with an image, or ""."""
        return self._reason("cannot run in two parts") if self.window is None else self.window.problem(image)

    def _reason(self, what: str) -> str:
        return f"the encoder of projector type {self.encoder.projector!r} {what}"

    def encode(
        self,
        plan: PromptPlan,
        watch: Stopwatch,
        notes: list[str],
        tell: Callable[[int, Encoded], object] | None = None,
    ) -> list[Encoded]:
        """Encodes the images whose output is not cached.

        Args:
            plan: The prompt's plan, with a config that `possible` has passed.
            watch: Steps "encode", "redundancy" and "encoder_stage", and "vision_stage" as far as attention is read.
            notes: Gets what could not be done.
            tell: Is given the index and the output of each image that is encoded whole, before the next one is.

        Raises:
            EngineError: The encoder failed.
        """
        with watch.step("encode"):
            return self._encode(plan, watch, notes, tell)

    def _encode(
        self, plan: PromptPlan, watch: Stopwatch, notes: list[str], tell: Callable[[int, Encoded], object] | None
    ) -> list[Encoded]:
        done: dict[int, Encoded] = {}
        config = plan.config
        if config is not None and (config.redundancy != "off" or config.prunes_in_encoder):
            first: dict[str, int] = {}
            for group in plan.groups:
                twins = {} if config.prunes_in_encoder else _twins(plan.images, group, first)
                done |= self._encode_group(plan, config, [i for i in group if i not in twins], watch, notes)
                done |= {i: _same(done[j], j) for i, j in twins.items() if j in done}
        attention = config.encoder_attention if config is not None else None
        seen: dict[str, int] = {}
        compared = Compared()
        for i in range(len(plan.images)):
            if i not in done:
                done[i] = self._encode_whole(plan.images, i, attention, config is not None, seen, compared, done)
                if tell is not None:
                    tell(i, done[i])
        encoded = [done[i] for i in range(len(done))]
        watch.take("vision_stage", sum(e.score_seconds for e in encoded))
        return encoded

    # ---- whole images ----

    def _encode_whole(
        self,
        images: Sequence[ImageChunk],
        i: int,
        attention: str | None,
        want_cells: bool,
        seen: dict[str, int],
        compared: Compared,
        done: dict[int, Encoded],
    ) -> Encoded:
        """One image. Images of equal pixels are encoded once, such as frames of a video, and blank crops of a page.

        seen: by a picture's pixels and a crop's place in it, the first such image. compared: crops so far.
        """
        self.image, image = i, images[i]
        if image.content in seen:
            return _same(done[seen[image.content]], seen[image.content])
        if image.content:
            seen[image.content] = i
        crops = sum(other.picture == image.picture for other in images)
        if (
            crops == 1
            or self.encoder.projector not in PROFILES
            or self.encoder.is_cached(image, attention, want_cells=want_cells)
        ):
            return self.encoder.encode_once(image, attention, want_cells=want_cells)
        # The run itself takes a sample of the pixels, and ends where an earlier crop had the same one. Only then is it
        # worth a run of either that counts, which on a GPU takes half as long as to encode a crop.
        plan = Plan(compare=Compare(PIXELS, compared.samples))
        try:
            encoded = self.encoder.encode_once(image, attention, want_cells=want_cells, plan=plan)
        except LooksKnownError as found:
            what = self._fingerprint(image)
            for j in compared.like(found.known):
                if j not in compared.fingerprints:
                    compared.fingerprints[j] = self._fingerprint(images[j])
                if what is not None and what == compared.fingerprints[j]:
                    same = replace(_same(done[j], j), cached=False)
                    self.encoder.remember(image, same, attention, want_cells=want_cells)
                    return same
            compared.fingerprints[i] = what
            plan = Plan(compare=Compare(PIXELS, compared.samples[:0]))
            encoded = self.encoder.encode_once(image, attention, want_cells=want_cells, plan=plan)
        if (sample := self.encoder.last_outcome.sample) is not None:
            compared.add(i, sample)
        return encoded

    def _fingerprint(self, image: ImageChunk) -> bytes | None:
        """Stands for all that an image's output depends on, or None if that is not known.

        Graphs of the encoders that have a profile depend on the pixels and their number alone. The number of nodes
        tells apart what else there may be, such as an overview and a tile.
        """
        if self.encoder.projector not in PROFILES or image.size is None:
            return None
        pixels = np.empty((3, *image.size), np.float32)
        try:
            with self.encoder.tap.watching(PIXELS, pixels):
                outcome = self.encoder.run(image, Plan(count_only=True))
        except EngineError:
            return None
        if self.encoder.tap.watched() != pixels.nbytes:
            return None
        about = repr((image.size, image.n_tokens, image.grid, outcome.n_skipped)).encode()
        return hashlib.sha256(about + pixels.tobytes()).digest()

    # ---- parts of images ----

    def _encode_group(
        self, plan: PromptPlan, config: PruneConfig, group: Sequence[int], watch: Stopwatch, notes: list[str]
    ) -> dict[int, Encoded]:
        """Images that share a budget. Those that have to be encoded whole are left out."""
        layer = None
        if config.prunes_in_encoder:
            assert self.window is not None  # `possible` has made sure of it
            layer = window_layer(self.window, config.encoder_layer)
        attention = config.encoder_attention
        keys = {i: self._key(plan, config, group, i, layer) for i in group}
        done = {i: found for i in group if (found := self._cached(keys[i], plan.images[i], attention)) is not None}
        if layer is not None and len(group) > 1 and len(done) < len(group):
            done = {}  # they share what stays
        works = []
        features: dict[int, UnitFeatures | None] = {}
        selections: dict[int, Selection] = {}
        for i in group:
            if i not in done:
                with nullcontext() if config.redundancy == "off" else watch.step("redundancy"):
                    work = self._units(i, plan.images[i], config, notes)
                if work is None or (layer is None and work.picture is None):
                    continue
                works.append(work)
                if layer is None:  # at once: pixels have megabytes
                    features[i] = self._encode_units(work, attention, notes)
        if layer is not None:
            features, selections = self._encode_in_windows(plan, config, works, layer, watch, notes)
        for work in works:
            i, made = work.number, features[work.number]
            if made is not None:
                done[i] = self._encoded(plan.images[i], config, work, made, selections.get(i), layer)
                self._remember(keys[i], done[i], attention)
        return done

    def _units(self, i: int, image: ImageChunk, config: PruneConfig, notes: list[str]) -> _Work | None:
        """The units of an image that enter the encoder. None: it has no grid."""
        if image.grid is None:
            return None
        n = image.grid[0] * image.grid[1]
        whole = _Work(i, np.arange(n), np.ones(n))
        if config.redundancy == "off" or self.composer is None:
            return whole
        picture = self.composer.look(image)
        if picture is None:
            if config.redundancy != "auto":
                notes.append("no tokens are left out before the encoder: an image has other pixels than its tokens say")
            return whole
        pixels, tolerance = picture.pixels, 0.0
        if isinstance(config.redundancy, float):
            deviation = np.asarray(self.encoder.metadata["clip.vision.image_std"], np.float32)
            pixels, tolerance = pixels * deviation[:, None, None], config.redundancy
        stands = representatives(pixels, picture.grid, tolerance)
        n_kept = self.composer.fitting(int((stands == np.arange(n)).sum()), image)
        if n_kept >= n:
            return whole
        units, mass = masses(with_more(stands, n_kept))
        return _Work(i, units, mass, picture.only(units))

    def _encode_units(self, work: _Work, attention: str | None, notes: list[str]) -> UnitFeatures | None:
        assert self.composer is not None and work.picture is not None  # `_units` has left some out
        self.image = work.number
        try:
            return self.composer.encode(work.picture, work.units, attention)
        except EngineError as error:
            notes.append(f"no tokens were left out before the encoder: {error.cause}")
            return None
        finally:
            work.picture = None

    def _encode_in_windows(
        self,
        plan: PromptPlan,
        config: PruneConfig,
        works: Sequence[_Work],
        layer: int,
        watch: Stopwatch,
        notes: list[str],
    ) -> tuple[dict[int, UnitFeatures | None], dict[int, Selection]]:
        """Features of the images, and what stayed of the units that entered the encoder."""
        assert self.window is not None  # `possible` has made sure of it
        images = plan.images
        try:
            firsts = [self._first(images[w.number], w, layer, config) for w in works]
            watch.take("encoder_stage", sum(first.score_seconds for first in firsts))
            with watch.step("encoder_stage"):
                selections = self._choose(plan, config, works, firsts, notes)
            features: dict[int, UnitFeatures | None] = {}
            for w in works:
                self.image = w.number
                first = firsts.pop(0)  # whose hidden states go as soon as they have been used
                features[w.number] = self.window.rest(first, selections[w.number].kept, config.encoder_attention)
            return features, selections
        except EngineError as error:
            notes.append(f"no encoder stage: {error.cause}")
            return {w.number: None for w in works}, {}

    def _first(self, image: ImageChunk, work: _Work, layer: int, config: PruneConfig) -> FirstPass:
        assert self.window is not None  # `possible` has made sure of it
        self.image = work.number
        wants = VISION_SCORERS[config.vision_scorer].reads is not None and config.chooses_by_score
        picture, work.picture = work.picture, None
        return self.window.first(image, layer, wants, picture, None if picture is None else work.units)

    def _choose(
        self,
        plan: PromptPlan,
        config: PruneConfig,
        works: Sequence[_Work],
        firsts: Sequence[FirstPass],
        notes: list[str],
    ) -> dict[int, Selection]:
        """What stays of the units that entered the encoder, by the image's number."""
        window = self.window
        assert window is not None  # which has made the first passes
        candidates = [
            Candidates(
                Tokens(first.vectors, first.units, first.chunk.grid, self._mass(config, w.mass), first.attention),
                None,
                first.chunk.picture,
                first.chunk.n_tokens - plan.n_special[w.number],
            )
            for w, first in zip(works, firsts)
        ]
        policies = [encoder_policy(config, first.attention is not None) for first in firsts]
        prepare(list(zip(policies, candidates)), self.encoder.n_threads)
        shares = self._shares(plan, config, works, candidates)
        numbers = [w.number for w in works]
        special = [plan.n_special[i] for i in numbers]
        least, left = [n + s for n, s in zip(shares, special)], [len(w.units) + s for w, s in zip(works, special)]
        mosts = plan.most_of(numbers, least, plan.n_encoder, left, to_decoder=not config.prunes_in_vision)
        room = []
        for w, first, n, most in zip(works, firsts, shares, mosts):
            most -= plan.n_special[w.number]
            if window.fitting(most, first.chunk) > most < len(w.units):  # rounded up, it would be over the room
                most = next((m for m in range(most, n, -1) if window.fitting(m, first.chunk) == m), n)
            room.append(most)
        n_at_once, n_threads = at_once(candidates, self.encoder.n_threads)

        def of_image(at: int) -> Selection:
            return choose(policies[at], candidates[at], shares[at], room[at], n_threads)

        selections = spread(of_image, range(len(works)), n_at_once)
        if config.encoder_adapts:
            notes += [
                f"there is room for {len(selection.kept)} of {len(w.units)} image tokens, which is less than "
                "encoder_tolerance asks for"
                for w, selection in zip(works, selections)
                if selection.too_few
            ]
        for at, (w, first, selection) in enumerate(zip(works, firsts, selections)):
            shares[at] = room[at] = min(len(w.units), window.fitting(len(selection.kept), first.chunk))
        again = [at for at, selection in enumerate(selections) if room[at] > len(selection.kept)]
        for at, selection in zip(again, spread(of_image, again, n_at_once)):
            selections[at] = selection  # the second pass runs on some numbers of units only
        return dict(zip(numbers, selections))

    def _shares(
        self, plan: PromptPlan, config: PruneConfig, works: Sequence[_Work], candidates: Sequence[Candidates]
    ) -> list[int]:
        """Units of each image that stay at least. Images of one group share them."""
        window = self.window
        assert window is not None  # which has made the first passes
        n_keep = [min(len(w.units), plan.n_encoder_least[w.number] - plan.n_special[w.number]) for w in works]
        if len(works) > 1 and any(n < len(w.units) for n, w in zip(n_keep, works)):
            policy = encoder_policy(config, all(c.tokens.attention is not None for c in candidates))
            n_keep = divide(policy, candidates, sum(n_keep), self.encoder.n_threads)
        chunks = [plan.images[w.number] for w in works]
        return fitted(n_keep, lambda i, n: min(len(works[i].units), window.fitting(n, chunks[i])))

    @staticmethod
    def _mass(config: PruneConfig, mass: np.ndarray) -> np.ndarray | None:
        """Masses, where tokens count for others at all and some do."""
        return mass if config.has_masses and (mass != 1).any() else None

    def _encoded(
        self,
        image: ImageChunk,
        config: PruneConfig,
        work: _Work,
        features: UnitFeatures,
        selection: Selection | None,
        layer: int | None,
    ) -> Encoded:
        special = image.special
        is_special = np.zeros(image.n_tokens, bool) if special is None else special
        of_unit = np.flatnonzero(~is_special)
        unit_mass = self._mass(config, work.mass) if selection is None else selection.mass
        is_whole = len(features.tokens) == image.n_tokens  # then each token stands for itself
        mass = None
        if unit_mass is not None and not is_whole:
            mass = np.ones(len(features.tokens))
            mass[~is_special[features.tokens]] = unit_mass
        out = np.setdiff1d(np.arange(len(of_unit)), work.units)
        return Encoded(
            features.embeddings,
            features.scores,
            cells_of(image.n_tokens, special),
            features.score_seconds,
            special,
            kept=None if is_whole else features.tokens,
            mass=mass,
            redundant=of_unit[out],
            layer=layer,
        )

    # ---- the cache ----

    def _key(
        self, plan: PromptPlan, config: PruneConfig, group: Sequence[int], i: int, layer: int | None
    ) -> bytes | None:
        """What the output of an image in parts is kept by: with a shared budget it depends on the other images."""
        image, cache = plan.images[i], self.encoder.cache
        if cache is None or not image.content:
            return None
        about: list[object] = [image.content, config.redundancy, config.has_masses]
        if layer is not None:
            sharers = [plan.images[k].content for k in group]
            if not all(sharers):
                return None
            counts = [(plan.n_encoder_least[k], plan.n_encoder[k]) for k in group]
            about += [layer, sharers, counts, config.encoder_tolerance, config.budget, config.vision_scorer]
            about += [config.vision_share, config.representatives, config.seed]
        return cache.key(repr(about))

    def _cached(self, key: bytes | None, image: ImageChunk, attention: str | None) -> Encoded | None:
        cache = self.encoder.cache
        if key is None or cache is None:
            return None
        found = cache.get(key, image.n_tokens, self.encoder.n_embd_inp, attention, False)
        if found is None:
            return None
        scores = None if attention is None else found.scores[attention]
        cells = cells_of(image.n_tokens, image.special)
        redundant = np.empty(0, np.int64) if found.redundant is None else found.redundant
        return Encoded(
            found.embeddings,
            scores,
            cells,
            0.0,
            image.special,
            cached=cache.is_of_earlier(key),
            kept=found.kept,
            mass=found.mass,
            redundant=redundant,
            layer=found.layer or None,
        )

    def _remember(self, key: bytes | None, encoded: Encoded, attention: str | None) -> None:
        cache = self.encoder.cache
        if key is None or cache is None:
            return
        scores = {} if attention is None or encoded.scores is None else {attention: encoded.scores}
        image = CachedImage(
            encoded.embeddings, None, scores, encoded.kept, encoded.mass, encoded.redundant, encoded.layer or 0
        )
        cache.put(key, image, len(encoded.cells))


def _same(encoded: Encoded, i: int) -> Encoded:
    """The output of an image whose pixels are those of image i, which is encoded."""
    return replace(encoded, score_seconds=0.0, same_as=i)


def _twins(images: Sequence[ImageChunk], group: Sequence[int], first: dict[str, int]) -> dict[int, int]:
    """Images of a group whose pixels an earlier image has, with its index. first: by pixels, the first such image."""
    found = {i: first.setdefault(images[i].content, i) for i in group if images[i].content}
    return {i: j for i, j in found.items() if i != j}


def fitted(counts: Sequence[int], fit: Callable[[int, int], int]) -> list[int]:
    """Numbers near these that the encoder can run on, together not fewer, and more by less than one step.

    fit: fit(i, n) is the smallest number for image i from n on, or all that there are.
    """
    up = [fit(i, n) for i, n in enumerate(counts)]
    down = [next((m for m in range(n, 0, -1) if fit(i, m) == m), up[i]) for i, n in enumerate(counts)]
    reach = [(n - low) / (high - low) if high > low else 0.0 for n, low, high in zip(counts, down, up)]
    for i in sorted(range(len(counts)), key=lambda i: -reach[i]):
        if sum(down) < sum(counts):
            down[i] = up[i]
    return down
