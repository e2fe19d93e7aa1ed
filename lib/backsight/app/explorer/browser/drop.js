// A place for a picture file: by the button, by the keyboard, or dropped on it.
const SENT_AS_IT_IS = 4 * 2 ** 20; // bytes; the notebook server takes messages of up to 10 MB
const LONGEST_SIDE = 1600; // pixels of what is sent of a larger file

async function smaller(file) {
  const bitmap = await createImageBitmap(file, { imageOrientation: "from-image" });
  const scale = Math.min(1, LONGEST_SIDE / Math.max(bitmap.width, bitmap.height));
  const canvas = new OffscreenCanvas(Math.ceil(bitmap.width * scale), Math.ceil(bitmap.height * scale));
  const context = canvas.getContext("2d");
  context.imageSmoothingQuality = "high";
  context.drawImage(bitmap, 0, 0, canvas.width, canvas.height);
  return canvas.convertToBlob({ type: "image/jpeg", quality: 0.95 });
}

function render({ model, el }) {
  el.innerHTML = `<div class="backsight-drop"><label>Your own picture: choose a file, or drop one here
    <input type="file" accept="image/*,.tif,.tiff"></label></div>`;
  const [zone, input] = [el.firstChild, el.querySelector("input")];

  async function take(file) {
    if (!file) return;
    try {
      const content = file.size > SENT_AS_IT_IS ? await smaller(file) : file;
      model.send({ kind: "file", name: file.name }, undefined, [await content.arrayBuffer()]);
    } catch {
      const text = `${file.name} is large, and no picture that this browser can read: choose a PNG, JPEG or WebP.`;
      model.send({ kind: "refused", text });
    }
  }

  input.addEventListener("change", () => {
    take(input.files[0]);
    input.value = ""; // so that the same file can be chosen again
  });
  for (const name of ["dragover", "dragleave", "drop"]) {
    zone.addEventListener(name, (event) => {
      event.preventDefault();
      event.stopPropagation();
      zone.classList.toggle("backsight-over", name === "dragover");
      if (name === "drop") take(event.dataTransfer.files[0]);
    });
  }
}

export default { render };
