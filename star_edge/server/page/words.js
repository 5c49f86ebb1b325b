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
  const smaller = full && full > all ? ` (${full} at the picture's own size)` : "";
  const tokens = Math.abs(read - all) < 0.05 ? `Read all ${all} image tokens${smaller}` : `Read ${number(read)} of ${all} image tokens${smaller}, on average over the layers`;
  return `${tokens}. First word after ${time(firstToken)}.`;
}

// What the time does not contain because an earlier question has paid for it.
export function cacheText(report) {
  const parts = [];
  if (report.n_cached) parts.push("the picture was encoded for an earlier question");
  if (report.reused_tokens) parts.push(`${report.reused_tokens} tokens were read for an earlier question`);
  return parts.length ? `${parts.join(", and ")}.`.replace(/^./, (c) => c.toUpperCase()) : "";
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
  preprocess: "picture made ready",
  redundancy: "repeating areas found",
  encode: "encoder",
  encoder_stage: "encoder stage",
  vision_stage: "vision stage",
  reuse: "earlier tokens taken up",
  prefix: "text before the picture",
  probe: "first decoder layers",
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
