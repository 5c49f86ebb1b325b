// A report in words.

export function time(ms) {
  if (ms < 1000) return `${ms.toFixed(0)} ms`;
  return ms < 60000 ? `${(ms / 1000).toFixed(1)} s` : `${Math.floor(ms / 60000)} min ${Math.round((ms % 60000) / 1000)} s`;
}

const number = (value) => Number(value.toFixed(value < 10 ? 1 : 0)).toString();

export function median(values) {
  const sorted = [...values].sort((a, b) => a - b);
  const half = sorted.length >> 1;
  return sorted.length % 2 ? sorted[half] : (sorted[half - 1] + sorted[half]) / 2;
}

// "Read 36 of 144 image tokens for each layer, first word after 0.4 s."
export function readText(report, firstToken) {
  const { average_tokens: read, n_image_tokens: all, n_full_tokens: full } = report;
  const n = report.pictures.length;
  const smaller = full && full > all ? ` (${full} at ${n === 1 ? "the picture's" : "the frames'"} own size)` : "";
  const of = n === 1 ? "" : ` of ${n} frames`;
  const tokens = Math.abs(read - all) < 0.05 ? `Read all ${all} image tokens${of}${smaller}` : `Read ${number(read)} of ${all} image tokens${of}${smaller}, on average over the layers`;
  return `${tokens}. First word after ${time(firstToken)}.`;
}

// What the time does not contain because an earlier question has paid for it.
export function cacheText(report) {
  const parts = [];
  const n = report.pictures.length;
  if (report.n_cached) parts.push(n === 1 ? "the picture was encoded for an earlier question" : `${report.n_cached === n ? `all ${n}` : `${report.n_cached} of ${n}`} frames were encoded for an earlier question`);
  if (report.reused_tokens) parts.push(`${report.reused_tokens} tokens were read for an earlier question`);
  return parts.length ? `${parts.join(", and ")}.`.replace(/^./, (c) => c.toUpperCase()) : "";
}

const clock = (second) => (second === null ? "" : `, ${second.toFixed(1)} s`);

// "Frame 2, 0.8 s". frames: of a report.
export const frameName = (frames, frame) => `Frame ${frames.indexOf(frame) + 1}${clock(frame.second)}`;

// "same as frame 1", or "".
export function sameText(frames, frame) {
  return frame.same_as === null ? "" : `same as frame ${frames.findIndex((other) => other.picture === frame.same_as) + 1}`;
}

// "3 frames were taken, of 0.5 s to 2.5 s. 1 of them is the same as an earlier one."
export function framesText(frames) {
  const [first, last, n] = [frames[0].second, frames.at(-1).second, frames.filter((frame) => frame.same_as !== null).length];
  const times = first === null ? "" : frames.length === 1 ? `, of ${first.toFixed(1)} s` : `, of ${first.toFixed(1)} s to ${last.toFixed(1)} s`;
  const taken = frames.length === 1 ? `1 frame was taken${times}` : `${frames.length} frames were taken${times}`;
  return `${taken}.${n ? ` ${n} of them ${n === 1 ? "is" : "are"} the same as an earlier one.` : ""}`;
}

// "Pruned: 3.2 times sooner than stock, and the same answer."
export function verdict(pruned, stock, isSame) {
  const ratio = stock / pruned;
  const factor = ratio >= 1 ? ratio : 1 / ratio;
  const compared = factor < 1.05 ? "as soon as stock" : `${number(factor)} times ${ratio >= 1 ? "sooner" : "later"} than stock`;
  return `First word ${compared}, ${isSame ? "and the same answer" : "and another answer"}. Both sides computed everything anew.`;
}

const STEPS = {
  queue: "waiting for a turn",
  preprocess: "pictures made ready",
  redundancy: "repeating areas found",
  encode: "encoder",
  encoder_stage: "encoder stage",
  vision_stage: "vision stage",
  reuse: "earlier tokens taken up",
  prefix: "text before the pictures",
  probe: "first decoder layers",
  look_ahead: "looking ahead",
  decoder_scores: "attention read",
  decoder_stage: "decoder stage",
  resume: "other decoder layers",
  prefill: "decoder",
  fallback: "kept tokens read again",
  first_token: "until the first word",
  generate: "the rest of the answer",
};

// [what, how long] of each step that took part.
export function steps(milliseconds) {
  const known = Object.keys(STEPS).filter((name) => milliseconds[name] !== undefined);
  const others = Object.keys(milliseconds).filter((name) => !(name in STEPS));
  return [...known, ...others].map((name) => [STEPS[name] || name.replaceAll("_", " "), time(milliseconds[name])]);
}

export const PRESETS = {
  server: "What the server was started with.",
  quality: "About half of the image tokens are read.",
  balanced: "About a quarter of the image tokens are read.",
  fast: "About a tenth of the image tokens is read. Small text may be lost.",
  document: "For pages of text: what is not blank paper, until late in the decoder.",
  share: "A share of the image tokens that you choose, averaged over the layers.",
  star: "A published method: STAR, two stages.",
  fastv: "A published method: FastV, in the decoder alone.",
  visionzip: "A published method: VisionZip, after the encoder alone.",
  divprune: "A published method: DivPrune, by how different tokens are.",
  pyramiddrop: "A published method: PyramidDrop, several stages in the decoder.",
};

export const MODES = {
  pruned: "skips image tokens that do not matter.",
  stock: "llama.cpp as it is: every image token is read.",
  both: "one after the other, to compare.",
};

// llama.cpp's chat takes no video.
export const MODES_OF_VIDEO = {
  ...MODES,
  stock: "llama.cpp as it is: the same frames as pictures, and every image token is read.",
  both: "one after the other, to compare. Stock gets the same frames, as pictures.",
};

export const BUDGETS = {
  "": "As the preset says: image, unless it says otherwise.",
  image: "The frames of a video share their image tokens, and so do the crops of a picture.",
  crop: "Nobody shares: each frame, and each crop of a picture, keeps its own share.",
  prompt: "All pictures and frames of the question share their image tokens.",
};
