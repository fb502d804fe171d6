// The images: for each of them the frames that have come, of which the scrubber chooses the one that is shown.

export class Grid {
  constructor(element, slider, output) {
    this.element = element;
    this.slider = slider;
    this.output = output;
    this.images = [];
    this.follows = true;
    slider.addEventListener("input", () => {
      this.follows = slider.value === slider.max;
      this.show();
    });
  }

  start(captions, width, height) {
    this.follows = true;
    this.slider.disabled = true;
    this.slider.max = this.slider.value = 0;
    this.output.value = "–";
    this.element.replaceChildren();
    this.images = captions.map((caption, i) => {
      const canvas = document.createElement("canvas");
      Object.assign(canvas, { width, height });
      canvas.setAttribute("role", "img");
      canvas.setAttribute("aria-label", `image ${i + 1}, ${caption}: not begun`);
      const figure = document.createElement("figure");
      const text = document.createElement("figcaption");
      text.textContent = caption;
      figure.append(canvas, text);
      this.element.append(figure);
      return { canvas, caption, frames: [] };
    });
  }

  // Add the frame of a row, counted from 1.
  add(i, row, rows, bitmap) {
    this.images[i].frames.push({ row, bitmap });
    this.images[i].frames.sort((a, b) => a.row - b.row);
    this.slider.disabled = false;
    this.slider.min = 1;
    this.slider.max = rows;
    if (this.follows) this.slider.value = Math.max(...this.images.flatMap((x) => x.frames.map((f) => f.row)));
    this.show();
  }

  show() {
    const at = Number(this.slider.value);
    this.output.value = `${at} of ${this.slider.max}`;
    this.images.forEach(({ canvas, caption, frames }, i) => {
      const frame = frames.filter((f) => f.row <= at).at(-1);
      const context = canvas.getContext("2d");
      context.clearRect(0, 0, canvas.width, canvas.height);
      canvas.dataset.row = frame ? frame.row : 0;
      if (!frame) return;
      context.drawImage(frame.bitmap, 0, 0);
      canvas.setAttribute("aria-label", `image ${i + 1}, ${caption}: after step ${frame.row} of ${this.slider.max}`);
    });
  }
}
