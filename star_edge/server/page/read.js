// What was read of a picture or of a video's frames: panels with what each stage kept.

import { framePanelsOf, panelsOf } from "./draw.js";
import { frameName, framesText, sameText } from "./words.js";

const $ = (id) => document.getElementById(id);
let newest = 0; // panels that were asked for last: pictures of frames are decoded meanwhile

function figureOf(title, texts, draw) {
  const figure = document.createElement("figure");
  const canvas = document.createElement("canvas");
  canvas.setAttribute("role", "img");
  canvas.setAttribute("aria-label", `${title}: ${texts.join(", ")}`);
  draw(canvas);
  const caption = document.createElement("figcaption");
  for (const [kind, text] of [["b", title], ...texts.map((text) => ["span", text])]) caption.append(Object.assign(document.createElement(kind), { textContent: text }));
  figure.append(canvas, caption);
  return figure;
}

// Shows a report. image: what to draw of a picture. what: the question.
export async function showRead(report, image, what) {
  const mine = ++newest;
  if (report.frames?.length) {
    const pictures = await Promise.all(report.frames.map(({ url }) => decoded(url)));
    if (mine === newest) showFrames(report, pictures, what);
    return;
  }
  const panels = panelsOf(report, image);
  show(panels.length ? `For "${what}". Dimmed: dropped. ${panels.problem}` : panels.problem);
  $("stage-row").hidden = true;
  $("panels").replaceChildren(...panels.map(({ stage, part, count, draw }) => figureOf(stage + part, [`${count} stayed`], draw)));
}

// One stage at a time: each frame has a panel.
function showFrames(report, pictures, what) {
  const panels = framePanelsOf(report, pictures);
  const stages = [...new Set(panels.map(({ stage }) => stage))];
  const select = $("stage");
  const drawStage = () =>
    $("panels").replaceChildren(
      ...panels
        .filter(({ stage }) => stage === select.value)
        .map(({ frame, part, count, draw }) => figureOf(frameName(report.frames, frame) + part, [`${count} stayed`, sameText(report.frames, frame)].filter(Boolean), draw)),
    );
  show(`For "${what}". ${framesText(report.frames)} Dimmed: dropped. ${panels.problem}`);
  select.replaceChildren(...stages.map((stage) => new Option(stage, stage, false, stage === stages.at(-1))));
  select.onchange = drawStage;
  $("stage-row").hidden = stages.length < 2;
  drawStage();
}

function show(text) {
  $("read-part").hidden = false;
  $("read-text").textContent = text;
}

export function hideRead() {
  newest += 1;
  $("read-part").hidden = true;
}

async function decoded(url) {
  const image = new Image();
  image.src = url;
  await image.decode();
  return image;
}
