// What is asked of the server, and what goes wrong on the way.

export const CHAT = "v1/chat/completions";

// An error that says what to do. needsKey: the key is missing or wrong. code: that of the server's error.
export class Problem extends Error {
  constructor(message, { needsKey = false, code = null } = {}) {
    super(message);
    [this.needsKey, this.code] = [needsKey, code];
  }

  // Whether the prompt does not fit the context.
  get isTooLong() {
    return this.code === "context_length_exceeded";
  }
}

// param: the place in the request, which its user has not written.
const problemOf = ({ message, code, param }) => new Problem(sentence(param && message.startsWith(`${param}: `) ? message.slice(param.length + 2) : message), { code });

export function headers(key) {
  const sent = { "Content-Type": "application/json" };
  if (key) sent.Authorization = `Bearer ${key}`;
  return sent;
}

async function reach(path, options) {
  try {
    return await fetch(path, options);
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Problem(`The server at ${location.host} does not answer. Look whether "star-edge serve" is still running there, start it again, and ask once more.`);
  }
}

async function failure(response, key) {
  const body = await response.json().catch(() => null);
  const said = body?.error?.message;
  if (response.status === 401) {
    const cause = key ? "The server does not take this API key." : "This server wants an API key.";
    return new Problem(`${cause} Type it into "API key" under Settings, and ask again.`, { needsKey: true });
  }
  if (response.status === 503) return new Problem(`${said || "The server is busy."} Ask again in a few seconds.`);
  return said ? problemOf(body.error) : new Problem(`The server answered with status ${response.status}. Its log says why.`);
}

const sentence = (text) => (/^\w+=/.test(text) ? text[0] : text[0].toUpperCase()) + text.slice(1) + (/[.!?]$/.test(text) ? "" : ".");

export async function getJSON(path, key) {
  const response = await reach(path, { headers: headers(key) });
  if (!response.ok) throw await failure(response, key);
  return response.json();
}

// The chunks of a chat completion, as they come.
export async function* stream(body, key, signal) {
  const response = await reach(CHAT, { method: "POST", headers: headers(key), body: JSON.stringify({ ...body, stream: true }), signal });
  if (!response.ok) throw await failure(response, key);
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let text = "";
  for (;;) {
    let part;
    try {
      part = await reader.read();
    } catch (error) {
      if (error.name === "AbortError") throw error;
      throw new Problem("The connection broke before the answer was complete. Ask again; if it breaks again, the server's log says why.");
    }
    if (part.done) return;
    text += part.value.replaceAll("\r", "");
    const events = text.split("\n\n");
    text = events.pop();
    for (const event of events) {
      const data = event.split("\n").filter((line) => line.startsWith("data: ")).map((line) => line.slice(6)).join("\n");
      if (!data || data === "[DONE]") continue;
      const chunk = JSON.parse(data);
      if (chunk.error) throw problemOf(chunk.error);
      yield chunk;
    }
  }
}

// Of the picture's tokens, averaged over the layers, when the decoder stage comes two thirds of the way in: 2 v / 3 + d / 3.
function shareConfig(percent) {
  const share = percent / 100;
  const vision = Math.min(1, 1.2 * share);
  const config = { decoder_keep: vision < 1 ? vision / 2 : 3 * share - 2 };
  if (vision < 1) config.vision_keep = vision; // left out is all; JSON has no 1.0, and 1 would be one token
  return config;
}

// A config whose images share one budget, as --budget makes it: what they share has a number. So nothing adapts to the
// picture, and an encoder stage that may then leave less than a later stage keeps is left out.
function shared({ vision_tolerance, encoder_tolerance, ...config }) {
  const { encoder_keep: encoder } = config;
  const exceeds = (keep) => keep > encoder && keep < 1 === encoder < 1; // shares and counts are not compared
  if (!exceeds(config.vision_keep) && !exceeds(config.decoder_keep)) return config;
  const { encoder_keep, encoder_layer, ...rest } = config;
  return rest;
}

// The request's `prune`. undefined: as the server was started. presets: the fields of each by name, from setup.json; of
// "server" too where more is asked of the server's own.
export function pruneOf(settings, presets) {
  const { preset, share, size, repeats, budget } = settings;
  const more = {};
  if (size < 1) more.image_max_tokens = size;
  if (repeats && !(presets[preset]?.redundancy > 0)) more.redundancy = "exact"; // a number leaves out more
  if (budget) more.budget = budget;
  if (preset === "server" && !Object.keys(more).length) return undefined;
  if (preset === "share") return { ...shareConfig(share), ...more };
  if (!Object.keys(more).length) return preset;
  const config = { ...presets[preset], ...more };
  return budget === "prompt" ? shared(config) : config;
}

// The part of a message that a picture or a video is. media: of `readFiles`. nframes, fps: of a video; undefined: the server's.
export function partOf({ isVideo, isSeries, files }, { nframes, fps }) {
  const [{ url }] = files;
  if (!isVideo) return { type: "image_url", image_url: { url } };
  if (isSeries) return { type: "video", video: files.map((file) => file.url), nframes };
  return { type: "video_url", video_url: { url }, nframes, fps };
}

// The messages of a conversation as one side has answered it, with a picture or a video in its first question.
export function messagesOf(turns, side, question, part) {
  const messages = [];
  const add = (text) => messages.push({ role: "user", content: messages.length ? text : [part, { type: "text", text }] });
  for (const turn of turns) {
    const said = turn.answers[side] ?? Object.values(turn.answers)[0];
    if (said === undefined) continue;
    add(turn.question);
    messages.push({ role: "assistant", content: said });
  }
  add(question);
  return messages;
}
