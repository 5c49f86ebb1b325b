// What a question is about: a picture, a video, or pictures as the frames of one.

import { Problem } from "./api.js";

const VIDEO_FILE = /\.(mp4|m4v|mov|webm|mkv|avi|mpe?g|m?ts|m2ts|ogv|3gp|3g2|flv|wmv|asf|ivf|h264|hevc)$/i;
const PREVIEW_MS = 10000; // a browser that has shown nothing of a video by then will not
const byName = (a, b) => a.name.localeCompare(b.name, "en", { numeric: true });

// Reads chosen files. setup: from setup.json. Returns {isVideo, isSeries, image, files, name, text}: image is an ImageBitmap to
// show, or null for a video that the browser cannot play; files are {name, kind, url}, each url a data: URL.
export async function readFiles(files, setup) {
  checkSize(files, setup);
  return files.length > 1 ? readSeries([...files].sort(byName)) : readOne(files[0]);
}

function checkSize(files, { max_image_bytes: most, max_body_bytes: mostOfBody }) {
  for (const file of files) {
    const what = files.length > 1 ? `"${file.name}"` : isVideoFile(file) ? "The video" : "The picture";
    if (file.size > most) throw new Problem(`${what} has ${file.size} bytes and this server takes ${most}. Make it ${isVideoFile(file) ? "smaller or shorter" : "smaller"}, or start the server with a higher --max-image-bytes.`);
  }
  const sent = files.reduce((sum, file) => sum + 4 * Math.ceil(file.size / 3), 0); // as base64
  if (sent > mostOfBody) throw new Problem(`A question with ${files.length > 1 ? "these files" : "this file"} has more than ${sent} bytes and this server takes ${mostOfBody}. Make ${files.length > 1 ? "them smaller or fewer" : "it smaller"}, or start the server with a higher --max-body-bytes.`);
}

async function readOne(file) {
  const bytes = new DataView(await file.arrayBuffer());
  const n = countFrames(bytes);
  const image = isVideoFile(file) ? null : await createImageBitmap(file).catch(() => null);
  if (image && n < 2) return media(image, [file], file.name, size(image));
  if (image) return media(image, [file], file.name, `${n} frames, ${size(image)}`, { isVideo: true });
  if (!isVideoFile(file)) throw new Problem("The browser cannot show this file as a picture, and its name is not that of a video. Choose a PNG, JPEG, WebP or GIF, or a video such as MP4 or WebM.");
  const shown = await playAt(file);
  const about = shown ? [...(shown.seconds ? [`${shown.seconds.toFixed(1)} s`] : []), size(shown.image)].join(", ") : "which this browser cannot show; the server may read it";
  return media(shown?.image ?? null, [file], file.name, about, { isVideo: true });
}

async function readSeries(files) {
  const other = files.find((file) => !file.type.startsWith("image/"));
  if (other) throw new Problem(`"${other.name}" is no picture, and several files are the frames of one video. Choose one video, or several pictures.`);
  const image = await createImageBitmap(files[0]).catch(() => null);
  if (!image) throw new Problem(`The browser cannot show "${files[0].name}" as a picture. Choose PNG, JPEG, WebP or GIF files.`);
  return media(image, files, `${files.length} pictures as frames`, `${files[0].name} to ${files.at(-1).name}`, { isVideo: true, isSeries: true });
}

async function media(image, files, name, text, { isVideo = false, isSeries = false } = {}) {
  const read = await Promise.all(files.map(async (file) => ({ name: file.name, kind: kindOf(file), url: await dataUrl(file) })));
  return { isVideo, isSeries, image, files: read, name, text };
}

const size = (image) => `${image.width} × ${image.height} pixels`;
const kindOf = (file) => file.type.split(";")[0] || "application/octet-stream";
const isVideoFile = (file) => file.type.startsWith("video/") || VIDEO_FILE.test(file.name);

const dataUrl = (file) =>
  new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve(reader.result);
    reader.onerror = () => reject(new Problem(`"${file.name}" cannot be read (${reader.error.message}). Choose it again.`));
    reader.readAsDataURL(new Blob([file], { type: kindOf(file) })); // of its type without parameters, which may have commas
  });

// A picture from the middle of a video, and how long that is. null: the browser cannot play it.
async function playAt(file) {
  const video = document.createElement("video");
  const come = (event) =>
    new Promise((resolve, reject) => {
      video.addEventListener(event, resolve, { once: true });
      video.addEventListener("error", reject, { once: true });
      setTimeout(reject, PREVIEW_MS);
    });
  [video.muted, video.preload, video.src] = [true, "auto", URL.createObjectURL(file)];
  try {
    await come("loadeddata");
    const seconds = Number.isFinite(video.duration) ? video.duration : 0;
    if (seconds) {
      const there = come("seeked");
      video.currentTime = seconds / 2;
      await there;
    }
    return { image: await createImageBitmap(video), seconds };
  } catch {
    return null;
  } finally {
    URL.revokeObjectURL(video.src);
    video.removeAttribute("src");
  }
}

// ---- how many frames an image file has: a still picture stays a picture ----

// Frames of a GIF, WebP or PNG. 1 for anything else, and for what is cut off before a second one.
export function countFrames(bytes) {
  const text = (at, n) => (at + n <= bytes.byteLength ? String.fromCharCode(...new Uint8Array(bytes.buffer, bytes.byteOffset + at, n)) : "");
  try {
    if (text(0, 4) === "GIF8") return framesOfGif(bytes);
    if (text(0, 4) === "RIFF" && text(8, 4) === "WEBP") return framesOfWebP(bytes, text);
    if (text(1, 3) === "PNG") return framesOfPng(bytes, text);
  } catch (error) {
    if (!(error instanceof RangeError)) throw error; // a read past the end
  }
  return 1;
}

function framesOfGif(bytes) {
  const tableAt = (at) => (bytes.getUint8(at) & 0x80 ? 3 * 2 ** ((bytes.getUint8(at) & 7) + 1) : 0);
  let n = 0;
  let at = 13 + tableAt(10);
  const skipBlocks = () => {
    while (bytes.getUint8(at)) at += bytes.getUint8(at) + 1;
    at += 1;
  };
  try {
    for (;;) {
      const kind = bytes.getUint8(at);
      if (kind === 0x2c) at += 11 + tableAt(at + 9); // a picture, with its own table, and the size of its codes
      else if (kind === 0x21) at += 2; // an extension
      else return n;
      skipBlocks();
      if (kind === 0x2c) n += 1;
    }
  } catch (error) {
    if (!(error instanceof RangeError) || !n) throw error;
    return n;
  }
}

function framesOfWebP(bytes, text) {
  let n = 0;
  for (let at = 12; at + 8 <= bytes.byteLength; at += 8 + bytes.getUint32(at + 4, true) + (bytes.getUint32(at + 4, true) & 1)) {
    if (text(at, 4) === "ANMF") n += 1;
  }
  return Math.max(n, 1);
}

function framesOfPng(bytes, text) {
  for (let at = 8; at + 8 <= bytes.byteLength && text(at + 4, 4) !== "IDAT"; at += 12 + bytes.getUint32(at)) {
    if (text(at + 4, 4) === "acTL") return Math.max(bytes.getUint32(at + 8), 1);
  }
  return 1;
}
