// A place for a picture file: by the button, by the keyboard, or dropped on it.
const SENT_AS_IT_IS = 4 * 2 ** 20; // bytes; the notebook server takes messages of up to 10 MB
const LONGEST_SIDE = 1600; // pixels of what is sent of a larger file
const LARGEST_FILE = 64 * 2 ** 20;

async function smaller(file) {
  const bitmap = await createImageBitmap(file, { imageOrientation: "from-image" });
  const scale = Math.min(1, LONGEST_SIDE / Math.max(bitmap.width, bitmap.height));
  const canvas = document.createElement("canvas");
  canvas.width = Math.max(1, Math.round(bitmap.width * scale));
  canvas.height = Math.max(1, Math.round(bitmap.height * scale));
  const context = canvas.getContext("2d");
  context.imageSmoothingQuality = "high";
  context.drawImage(bitmap, 0, 0, canvas.width, canvas.height);
  bitmap.close();
  return new Promise((resolve) => canvas.toBlob(resolve, "image/jpeg", 0.95));
}

function render({ model, el }) {
  const zone = document.createElement("div");
  zone.className = "backsight-drop";
  const label = document.createElement("label");
  label.textContent = "Your own picture: choose a file, or drop one here";
  const input = document.createElement("input");
  input.type = "file";
  input.accept = "image/*,.tif,.tiff";
  label.append(input);
  zone.append(label);
  el.append(zone);

  const refuse = (text) => model.send({ kind: "refused", text });

  async function take(file) {
    if (!file) return;
    if (file.size > LARGEST_FILE) {
      refuse(`${file.name} has ${Math.round(file.size / 2 ** 20)} MB; pictures of up to 64 MB are taken: make it smaller first.`);
      return;
    }
    let content = file;
    if (file.size > SENT_AS_IT_IS) {
      try {
        content = await smaller(file);
      } catch {
        refuse(`${file.name} is no picture that this browser can read: choose a PNG, JPEG or WebP, or a file of less than 4 MB.`);
        return;
      }
    }
    model.send({ kind: "file", name: file.name }, undefined, [await content.arrayBuffer()]);
  }

  input.addEventListener("change", () => {
    take(input.files[0]);
    input.value = ""; // so that the same file can be chosen again
  });
  for (const name of ["dragenter", "dragover"]) {
    zone.addEventListener(name, (event) => {
      event.preventDefault();
      event.stopPropagation();
      zone.classList.add("backsight-over");
    });
  }
  zone.addEventListener("dragleave", () => zone.classList.remove("backsight-over"));
  zone.addEventListener("drop", (event) => {
    event.preventDefault();
    event.stopPropagation();
    zone.classList.remove("backsight-over");
    take(event.dataTransfer.files[0]);
  });
}

export default { render };
