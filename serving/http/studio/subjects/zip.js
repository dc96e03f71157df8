/** A zip file of what is already compressed: entries are stored as they are. */

const TABLE = Uint32Array.from({ length: 256 }, (_, byte) => {
  let value = byte;
  for (let bit = 0; bit < 8; bit += 1) value = value & 1 ? (value >>> 1) ^ 0xedb88320 : value >>> 1;
  return value;
});
const LOCAL = 0x04034b50;
const CENTRAL = 0x02014b50;
const END = 0x06054b50;
const UTF8 = 0x0800;

/** The zip of [name, Blob] pairs, as a Blob. */
export async function zipOf(files) {
  const parts = [];
  const directory = [];
  let at = 0;
  for (const [name, blob] of files) {
    const bytes = new Uint8Array(await blob.arrayBuffer());
    const path = new TextEncoder().encode(name);
    const entry = [20, UTF8, 0, 0, 0x21, checksum(bytes), bytes.length, bytes.length, path.length, 0];
    const head = record(LOCAL, entry, "22222444" + "22");
    const index = record(CENTRAL, [20, ...entry, 0, 0, 0, 0, at], "222222444" + "22" + "22244");
    parts.push(head, path, bytes);
    directory.push(index, path);
    at += head.length + path.length + bytes.length;
  }
  const size = directory.reduce((sum, part) => sum + part.length, 0);
  const end = record(END, [0, 0, files.length, files.length, size, at, 0], "2222442");
  return new Blob([...parts, ...directory, end], { type: "application/zip" });
}

/** A signature and numbers, little-endian; `widths` has the bytes of each. */
function record(signature, numbers, widths) {
  const size = [...widths].reduce((sum, width) => sum + Number(width), 4);
  const view = new DataView(new ArrayBuffer(size));
  view.setUint32(0, signature, true);
  let at = 4;
  numbers.forEach((number, index) => {
    if (widths[index] === "4") view.setUint32(at, number, true);
    else view.setUint16(at, number, true);
    at += Number(widths[index]);
  });
  return new Uint8Array(view.buffer);
}

function checksum(bytes) {
  let value = 0xffffffff;
  for (const byte of bytes) value = TABLE[(value ^ byte) & 0xff] ^ (value >>> 8);
  return (value ^ 0xffffffff) >>> 0;
}
