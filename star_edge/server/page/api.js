// What is asked of the server, and what goes wrong on the way.

const CHAT = "v1/chat/completions";

// An error that says what to do. needsKey: the key is missing or wrong.
export class Problem extends Error {
  constructor(message, needsKey = false) {
    super(message);
    this.needsKey = needsKey;
  }
}

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
    return new Problem(`${cause} Type it into "API key" under Settings, and ask again.`, true);
  }
  if (response.status === 503) return new Problem(`${said || "The server is busy."} Ask again in a few seconds.`);
  return new Problem(said ? sentence(said) : `The server answered with status ${response.status}. Its log says why.`);
}

const sentence = (text) => text[0].toUpperCase() + text.slice(1) + (/[.!?]$/.test(text) ? "" : ".");

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
      if (chunk.error) throw new Problem(sentence(chunk.error.message));
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

// The request's `prune`. undefined: as the server was started. presets: the fields of each by name, from setup.json.
export function pruneOf(settings, presets) {
  const { preset, share, size, repeats } = settings;
  const more = {};
  if (size < 1) more.image_max_tokens = size;
  if (repeats) more.redundancy = "exact";
  if (preset === "server" && !Object.keys(more).length) return undefined;
  if (preset === "share") return { ...shareConfig(share), ...more };
  return Object.keys(more).length ? { ...presets[preset], ...more } : preset;
}

// The messages of a conversation as one side has answered it, with the picture in its first question.
export function messagesOf(turns, side, question, pictureUrl) {
  const messages = [];
  const add = (text) => messages.push({ role: "user", content: messages.length ? text : [{ type: "image_url", image_url: { url: pictureUrl } }, { type: "text", text }] });
  for (const turn of turns) {
    const said = turn.answers[side] ?? Object.values(turn.answers)[0];
    if (said === undefined) continue;
    add(turn.question);
    messages.push({ role: "assistant", content: said });
  }
  add(question);
  return messages;
}

// ---- the same request outside the page ----

const FILE = "PICTURE_FILE";

// What is put in place of the picture's bytes, and the request without what only the page needs.
function plain(body) {
  const { star_edge: ignored, ...rest } = body;
  const messages = rest.messages.map((message) => ({
    ...message,
    content: typeof message.content === "string" ? message.content : message.content.map((part) => (part.type === "image_url" ? { type: "image_url", image_url: { url: FILE } } : part)),
  }));
  return { ...rest, messages };
}

export function asCurl(body, model, file, needsKey) {
  const json = JSON.stringify({ model, ...plain(body) }, null, 2).replace(/[\\$`]/g, "\\$&"); // what a shell would expand in a here-document
  const picture = `data:image/png;base64,$(base64 < '${file.replaceAll("'", "'\\''")}' | tr -d '\\n')`;
  const key = needsKey ? ` -H "Authorization: Bearer $STAR_EDGE_API_KEY"` : "";
  return `curl ${location.origin}/${CHAT} -H 'Content-Type: application/json'${key} -d @- <<JSON\n${json.replace(FILE, picture)}\nJSON`;
}

function pythonOf(value, indent = "") {
  const inner = `${indent}    `;
  if (value === null) return "None";
  if (typeof value === "boolean") return value ? "True" : "False";
  if (value === FILE) return 'f"data:image/png;base64,{picture}"';
  if (typeof value !== "object") return JSON.stringify(value);
  const list = Array.isArray(value);
  const items = list ? value.map((item) => pythonOf(item, inner)) : Object.entries(value).map(([name, item]) => `${JSON.stringify(name)}: ${pythonOf(item, inner)}`);
  const [open, close] = list ? "[]" : "{}";
  const short = `${open}${items.join(", ")}${close}`;
  return short.length < 90 && !short.includes("\n") ? short : `${open}\n${items.map((item) => `${inner}${item},\n`).join("")}${indent}${close}`;
}

export function asPython(body, model, file, needsKey) {
  const { messages, max_tokens: maxTokens, temperature, prune, ...more } = plain(body);
  const extra = prune === undefined ? more : { prune, ...more };
  const key = needsKey ? 'os.environ["STAR_EDGE_API_KEY"]' : '"none"';
  return `import base64
${needsKey ? "import os\n" : ""}
from openai import OpenAI

client = OpenAI(base_url=${JSON.stringify(`${location.origin}/v1`)}, api_key=${key})
with open(${JSON.stringify(file)}, "rb") as file:
    picture = base64.b64encode(file.read()).decode()
messages = ${pythonOf(messages)}
answer = client.chat.completions.create(
    model=${JSON.stringify(model)},
    messages=messages,
    max_tokens=${maxTokens},
    temperature=${temperature},
    extra_body=${pythonOf(extra, "    ")},
)
print(answer.choices[0].message.content)
print(answer.star_edge["average_tokens"], "of", answer.star_edge["n_image_tokens"], "image tokens for each layer")`;
}
