/** Files that were dropped or chosen, by folder: a folder is a subject. */

const PHOTO = /\.(jpe?g|png|webp|gif|bmp|tiff?|heic|avif)$/i;
const CAPTIONS = "captions.txt";
const MOST = 2000;

/** The files of a drop, with their folders: [path, File]. */
export async function droppedFiles(transfer) {
  const entries = [...transfer.items].map((item) => item.webkitGetAsEntry?.()).filter(Boolean);
  if (!entries.length) return [...transfer.files].map((file) => [file.name, file]);
  const found = [];
  for (const entry of entries) await walk(entry, "", found);
  return found;
}

/** The files of a file input, with their folders. */
export function chosenFiles(input) {
  return [...input.files].map((file) => [file.webkitRelativePath || file.name, file]);
}

/** Photos by folder: [{folder, photos: [{file, caption}]}]. Captions are `<photo>.txt`, or lines of `captions.txt`. */
export async function byFolder(files) {
  const folders = new Map();
  for (const [path, file] of files) {
    const parts = path.split("/");
    const name = parts.pop();
    if (name.startsWith(".") || parts.some((part) => part.startsWith("."))) continue;
    const folder = parts.at(-1) ?? "";
    if (!folders.has(folder)) folders.set(folder, { photos: [], texts: new Map() });
    if (PHOTO.test(name) || file.type.startsWith("image/")) folders.get(folder).photos.push(file);
    else if (name.toLowerCase().endsWith(".txt")) folders.get(folder).texts.set(name, file);
  }
  const found = [];
  for (const [folder, { photos, texts }] of folders) {
    if (!photos.length) continue;
    const captions = await captionsOf(texts);
    photos.sort((a, b) => a.name.localeCompare(b.name, "en", { numeric: true }));
    found.push({
      folder,
      photos: photos.map((file) => ({ file, caption: captions.get(file.name) ?? captions.get(stem(file.name)) ?? "" })),
    });
  }
  return found.sort((a, b) => a.folder.localeCompare(b.folder));
}

/** A name without its ending. */
export function stem(name) {
  return name.replace(/\.[^.]*$/, "");
}

async function captionsOf(texts) {
  const captions = new Map();
  for (const [name, file] of texts) {
    const text = await file.text();
    if (name.toLowerCase() !== CAPTIONS) captions.set(stem(name), text.trim().replace(/\s+/g, " "));
    else {
      for (const line of text.split(/\r?\n/)) {
        const [, photo, caption] = /^\s*([^#\t:][^\t:]*)[:\t]\s*(.+)$/.exec(line) ?? [];
        if (photo) captions.set(photo.trim(), caption.trim());
      }
    }
  }
  return captions;
}

async function walk(entry, folder, found) {
  if (found.length >= MOST) return;
  const path = folder ? `${folder}/${entry.name}` : entry.name;
  if (entry.isFile) {
    found.push([path, await new Promise((resolve, reject) => entry.file(resolve, reject))]);
    return;
  }
  const reader = entry.createReader();
  for (;;) {
    const some = await new Promise((resolve, reject) => reader.readEntries(resolve, reject));
    if (!some.length) return;
    for (const one of some) await walk(one, path, found);
  }
}
