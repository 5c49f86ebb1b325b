"use strict";

const $ = (id) => document.getElementById(id);
const MAX_SIDE = 720; // pixels of a drawn picture
const MEASURE_AGAIN_MS = 3000; // first tokens that took less together are asked for twice more
// Every answer is computed afresh, of both sides: what an earlier question left in the caches would shorten the time of one of them alone.
const FAIR = { kept: true, afresh: true };
let setup = { max_image_bytes: Infinity, demo_questions: [], needs_key: false };
let picture = null; // {image: ImageBitmap, url: data URL}
let running = null; // AbortController of the questions under way
let asked = null; // the question that has been answered, for another budget
const firstToken = {}; // milliseconds by card, of each time it was asked
const generation = {}; // milliseconds by card, of the answer after its first token

// ---- the picture ----

async function usePicture(blob) {
  showError("");
  if (blob.size > setup.max_image_bytes) {
    return showError(`The picture has ${blob.size} bytes; this server takes ${setup.max_image_bytes}.`);
  }
  let image;
  try {
    image = await createImageBitmap(blob);
  } catch {
    return showError("This file is no picture that the browser can show.");
  }
  const url = await new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve(reader.result);
    reader.onerror = () => reject(reader.error);
    reader.readAsDataURL(blob);
  });
  stop();
  picture = { image, url };
  asked = null;
  $("drop").classList.add("has-picture");
  draw($("picture"), null, null);
  $("picture").setAttribute("aria-label", `The picture, ${image.width} by ${image.height} pixels`);
  clearStage("vision", "before the decoder");
  clearStage("decoder", "chosen by your question");
  for (const name of ["pruned", "stock"]) clearCard(name);
}

function clearStage(name, caption) {
  $(name).width = $(name).height = 0;
  $(name).setAttribute("aria-label", "Nothing asked yet");
  $(`${name}-count`).textContent = caption;
}

// Draws the picture and, with a grid, dims what was dropped. Encoders pad pictures to the grid's shape, centred.
function draw(canvas, grid, keptCells) {
  const { image } = picture;
  const [rows, columns] = grid || [image.height, image.width];
  const side = Math.max(image.height / rows, image.width / columns);
  const scale = MAX_SIDE / (side * Math.max(rows, columns));
  const cell = side * scale;
  canvas.width = Math.round(columns * cell);
  canvas.height = Math.round(rows * cell);
  const paper = canvas.getContext("2d");
  paper.fillStyle = "#767676";
  paper.fillRect(0, 0, canvas.width, canvas.height);
  paper.imageSmoothingEnabled = scale < 1;
  const [width, height] = [image.width * scale, image.height * scale];
  paper.drawImage(image, (canvas.width - width) / 2, (canvas.height - height) / 2, width, height);
  if (!keptCells) return;
  const kept = new Set(keptCells);
  const isKept = (r, c) => r >= 0 && c >= 0 && r < rows && c < columns && kept.has(r * columns + c);
  paper.fillStyle = "rgba(22, 21, 19, 0.76)";
  for (let r = 0; r < rows; r++) {
    for (let c = 0; c < columns; c++) {
      if (isKept(r, c)) continue;
      const [x, y] = [Math.round(c * cell), Math.round(r * cell)];
      paper.fillRect(x, y, Math.round((c + 1) * cell) - x, Math.round((r + 1) * cell) - y);
    }
  }
  if (cell < 5) return;
  paper.strokeStyle = "#ffb52e";
  paper.lineWidth = cell < 16 ? 1 : 2;
  paper.beginPath();
  for (let r = 0; r <= rows; r++) {
    for (let c = 0; c <= columns; c++) {
      if (isKept(r, c) !== isKept(r - 1, c) && kept.size < rows * columns) paper.moveTo(c * cell, r * cell), paper.lineTo((c + 1) * cell, r * cell);
      if (isKept(r, c) !== isKept(r, c - 1) && kept.size < rows * columns) paper.moveTo(c * cell, r * cell), paper.lineTo(c * cell, (r + 1) * cell);
    }
  }
  paper.stroke();
}

function showKept(report) {
  if (!report.kept || !report.kept.length) return;
  const [picture] = report.pictures;
  const [image] = report.kept;
  for (const [name, where] of [
    ["vision", ""],
    ["decoder", report.decoder_layer === null ? "" : `, from layer ${report.decoder_layer}`],
  ]) {
    const text = `${picture[`n_${name}_kept`]} of ${picture.n_tokens}${where}`;
    $(`${name}-count`).textContent = text;
    $(name).setAttribute("aria-label", `The ${name} stage kept ${text}`);
    // Where the crops of a picture lie is not known
    if (image.grid && picture.images.length === 1) draw($(name), image.grid, image[`${name}_kept`].map((token) => image.cells[token]));
  }
}

// ---- the budget ----

// Of the image's tokens, averaged over the layers, when the decoder stage comes two thirds of the way in: 2 v / 3 + d / 3.
function pruneFor(percent) {
  const share = percent / 100;
  if (share >= 1) return "off";
  const vision = Math.min(1, 1.2 * share);
  const decoder = vision < 1 ? vision / 2 : 3 * share - 2;
  const config = { decoder_keep: decoder };
  if (vision < 1) config.vision_keep = vision; // left out is all; 1 would be one token
  return config;
}

function showBudget() {
  const percent = Number($("budget").value);
  $("budget-text").textContent = percent >= 100 ? "all image tokens, as stock" : `about ${percent}% of the image tokens`;
}

// ---- questions ----

async function* chat(body, signal) {
  const headers = { "Content-Type": "application/json" };
  if ($("key").value) headers.Authorization = `Bearer ${$("key").value}`;
  const response = await fetch("v1/chat/completions", { method: "POST", headers, body: JSON.stringify(body), signal });
  if (!response.ok) {
    const problem = await response.json().catch(() => null);
    throw new Error(problem?.error?.message || `The server answered ${response.status}.`);
  }
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let text = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    text += value.replaceAll("\r", "");
    const events = text.split("\n\n");
    text = events.pop();
    for (const event of events) {
      const data = event.split("\n").filter((line) => line.startsWith("data: ")).map((line) => line.slice(6)).join("\n");
      if (!data || data === "[DONE]") continue;
      const chunk = JSON.parse(data);
      if (chunk.error) throw new Error(chunk.error.message);
      yield chunk;
    }
  }
}

function clearCard(name) {
  const card = $(name);
  for (const part of ["answer", "first", "tokens", "total", "notes"]) card.querySelector(`.${part}`).textContent = "";
  card.querySelector(".bar").style.width = "0";
  card.classList.remove("working");
  delete firstToken[name];
  $("verdict").textContent = "";
}

function request(name, question, maxTokens) {
  const parts = [{ type: "text", text: question }];
  if (picture) parts.unshift({ type: "image_url", image_url: { url: picture.url } });
  return {
    messages: [{ role: "user", content: parts }],
    prune: name === "stock" ? "off" : pruneFor(Number($("budget").value)),
    star_edge: FAIR,
    stream: true,
    temperature: 0,
    repeat_penalty: 1,
    max_tokens: maxTokens,
  };
}

async function answer(name, question, signal) {
  const card = $(name);
  const put = (part, text) => (card.querySelector(`.${part}`).textContent = text);
  clearCard(name);
  card.classList.add("working");
  let text = "";
  try {
    for await (const chunk of chat(request(name, question, 256), signal)) {
      text += chunk.choices[0].delta.content || "";
      put("answer", text.trimStart());
      const report = chunk.star_edge;
      if (!report) continue;
      const { first_token: first, generate } = report.milliseconds;
      firstToken[name] = [first];
      generation[name] = generate;
      put("tokens", `${Number(report.average_tokens.toFixed(1))} of ${report.n_image_tokens}`);
      put("notes", report.notes.join(" "));
      if (name === "pruned") showKept(report);
      compare();
    }
  } finally {
    if (!signal.aborted) card.classList.remove("working");
  }
}

// A single short time says little on a machine that does other things too, such as to draw this page.
async function measureAgain(names, question, signal) {
  const once = Object.values(firstToken).reduce((sum, times) => sum + times[0], 0);
  for (let round = 0; round < 2 && once < MEASURE_AGAIN_MS; round++) {
    for (const name of names) {
      for await (const chunk of chat(request(name, question, 1), signal)) {
        if (chunk.star_edge) firstToken[name].push(chunk.star_edge.milliseconds.first_token);
      }
      compare();
    }
  }
}

function median(values) {
  const sorted = [...values].sort((a, b) => a - b);
  const half = sorted.length >> 1;
  return sorted.length % 2 ? sorted[half] : (sorted[half - 1] + sorted[half]) / 2;
}
const milliseconds = (ms) => (ms < 10000 ? `${ms.toFixed(0)} ms` : `${(ms / 1000).toFixed(1)} s`);

function compare() {
  const medians = Object.fromEntries(Object.entries(firstToken).map(([name, times]) => [name, median(times)]));
  const longest = Math.max(...Object.values(medians));
  for (const [name, ms] of Object.entries(medians)) {
    $(name).querySelector(".first").textContent = milliseconds(ms);
    $(name).querySelector(".total").textContent = milliseconds(ms + generation[name]);
    $(name).querySelector(".bar").style.width = `${(100 * ms) / longest}%`;
  }
  const { pruned, stock } = medians;
  if (!pruned || !stock) return;
  const same = $("pruned").querySelector(".answer").textContent === $("stock").querySelector(".answer").textContent;
  const times = stock >= pruned ? `First token ${(stock / pruned).toFixed(2)}× sooner` : `First token ${(pruned / stock).toFixed(2)}× later`;
  $("verdict").textContent = `${times}; ${same ? "the same answer." : "another answer than stock's."}`;
}

function stop() {
  running?.abort();
  running = null;
  $("ask").disabled = false;
}

async function ask(question, names) {
  stop();
  showError("");
  if (!picture) return showError("Choose a picture first, or take the demo picture.");
  const mine = (running = new AbortController());
  $("ask").disabled = true;
  try {
    for (const name of names) await answer(name, question, mine.signal);
    asked = question;
    await measureAgain(names, question, mine.signal);
  } catch (error) {
    if (!mine.signal.aborted) showError(error.message);
  } finally {
    if (running === mine) stop();
  }
}

function showError(text) {
  $("error").textContent = text;
  $("error").hidden = !text;
}

// ---- events ----

const useDemo = async () => usePicture(await (await fetch("page/demo.png")).blob());

$("form").addEventListener("submit", (event) => {
  event.preventDefault();
  const question = $("question").value.trim();
  if (question) ask(question, ["pruned", "stock"]);
});
$("budget").addEventListener("input", showBudget);
$("budget").addEventListener("change", () => asked && ask(asked, ["pruned"].concat(firstToken.stock ? [] : ["stock"])));
$("file").addEventListener("change", (event) => event.target.files[0] && usePicture(event.target.files[0]));
$("demo").addEventListener("click", async () => {
  await useDemo();
  $("examples").hidden = false;
  if (!$("question").value) $("question").value = setup.demo_questions[0];
});
for (const kind of ["dragover", "dragleave", "drop"]) {
  document.addEventListener(kind, (event) => {
    event.preventDefault();
    $("drop").classList.toggle("over", kind === "dragover");
    const file = kind === "drop" && event.dataTransfer.files[0];
    if (file) usePicture(file);
  });
}
document.addEventListener("paste", (event) => {
  const file = [...event.clipboardData.files].find((f) => f.type.startsWith("image/"));
  if (file) usePicture(file);
});

async function begin() {
  showBudget();
  setup = await (await fetch("page/setup.json")).json();
  $("key-row").hidden = !setup.needs_key;
  for (const question of setup.demo_questions) {
    const button = document.createElement("button");
    button.type = "button";
    button.textContent = question;
    button.addEventListener("click", async () => {
      $("question").value = question;
      await ask(question, ["pruned", "stock"]);
    });
    $("examples").append(button);
  }
  if (!setup.needs_key) {
    const models = await (await fetch("v1/models")).json();
    $("model").textContent = models.data[0].id;
  }
}
begin().catch(() => showError("The server does not answer."));
