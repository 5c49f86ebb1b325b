// A request of the page as code that runs elsewhere. It reads the files in place of carrying their bytes.

import { CHAT } from "./api.js";

// Stands for the data: URL of a file.
class FileUrl {
  constructor({ name, kind }, index) {
    Object.assign(this, { name, kind, index });
  }

  toJSON() {
    return `FILE_${this.index}_`;
  }
}

// The request without what only the page needs, with files in place of their URLs.
function plain(body, files) {
  const { star_edge: ignored, ...rest } = body;
  const urls = new Map(files.map((file, index) => [file.url, new FileUrl(file, index)]));
  const swap = (value) => {
    if (typeof value === "string") return urls.get(value) ?? value;
    if (Array.isArray(value)) return value.map(swap);
    return value && typeof value === "object" ? Object.fromEntries(Object.entries(value).filter(([, item]) => item !== undefined).map(([name, item]) => [name, swap(item)])) : value;
  };
  return { ...rest, messages: rest.messages.map(swap) };
}

export function asCurl(body, model, files, needsKey) {
  const json = JSON.stringify({ model, ...plain(body, files) }, null, 2).replace(/[\\$`]/g, "\\$&"); // what a shell would expand in a here-document
  const read = ({ name, kind }) => `data:${kind};base64,$(base64 < '${name.replaceAll("'", "'\\''")}' | tr -d '\\n')`;
  const whole = json.replace(/"FILE_(\d+)_"/g, (all, index) => (files[index] ? `"${read(files[index])}"` : all));
  const key = needsKey ? ` -H "Authorization: Bearer $STAR_EDGE_API_KEY"` : "";
  return `curl ${location.origin}/${CHAT} -H 'Content-Type: application/json'${key} -d @- <<JSON\n${whole}\nJSON`;
}

function pythonOf(value, indent = "") {
  const inner = `${indent}    `;
  if (value === null) return "None";
  if (typeof value === "boolean") return value ? "True" : "False";
  if (value instanceof FileUrl) return `data_url(${JSON.stringify(value.name)}, ${JSON.stringify(value.kind)})`;
  if (typeof value !== "object") return JSON.stringify(value);
  const list = Array.isArray(value);
  const items = list ? value.map((item) => pythonOf(item, inner)) : Object.entries(value).map(([name, item]) => `${JSON.stringify(name)}: ${pythonOf(item, inner)}`);
  const [open, close] = list ? "[]" : "{}";
  const short = `${open}${items.join(", ")}${close}`;
  return short.length < 90 && !short.includes("\n") ? short : `${open}\n${items.map((item) => `${inner}${item},\n`).join("")}${indent}${close}`;
}

export function asPython(body, model, files, needsKey) {
  const { messages, max_tokens: maxTokens, temperature, prune, ...more } = plain(body, files);
  const extra = prune === undefined ? more : { prune, ...more };
  const key = needsKey ? 'os.environ["STAR_EDGE_API_KEY"]' : '"none"';
  return `import base64
${needsKey ? "import os\n" : ""}
from openai import OpenAI


def data_url(path, kind):
    with open(path, "rb") as file:
        return f"data:{kind};base64,{base64.b64encode(file.read()).decode()}"


client = OpenAI(base_url=${JSON.stringify(`${location.origin}/v1`)}, api_key=${key})
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
