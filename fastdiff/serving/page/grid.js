// The images: for each of them the frames that have come, of which a scrubber chooses the one that is shown.

export class Scrubber {
  constructor(slider, output) {
    this.slider = slider;
    this.output = output;
    this.grids = [];
    slider.addEventListener("input", () => {
      this.follows = slider.value === slider.max;
      this.show();
    });
    this.start();
  }

  start() {
    this.follows = true;
    this.slider.disabled = true;
    this.slider.max = this.slider.value = 0;
    this.output.value = "–";
  }

  // Note that there is a frame of this share of a run.
  reach(row, rows) {
    this.slider.disabled = false;
    this.slider.min = 1;
    this.slider.max = Math.max(rows, Number(this.slider.max));
    if (this.follows) this.slider.value = Math.max(Number(this.slider.value), Math.ceil((row / rows) * this.slider.max));
    this.show();
  }

  show() {
    this.output.value = `${this.slider.value} of ${this.slider.max}`;
    for (const grid of this.grids) grid.show(Number(this.slider.value) / Number(this.slider.max));
  }
}

export class Grid {
  constructor(element, scrubber) {
    this.element = element;
    this.scrubber = scrubber;
    this.images = [];
    scrubber.grids.push(this);
  }

  start(captions, width, height) {
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
    this.images[i].frames.push({ row, rows, bitmap });
    this.images[i].frames.sort((a, b) => a.row - b.row);
    this.scrubber.reach(row, rows);
  }

  // Show the last frames of a share of the run.
  show(share) {
    this.images.forEach(({ canvas, caption, frames }, i) => {
      const frame = frames.filter((f) => f.row <= share * f.rows + 1e-6).at(-1);
      const context = canvas.getContext("2d");
      context.clearRect(0, 0, canvas.width, canvas.height);
      canvas.dataset.row = frame ? frame.row : 0;
      if (!frame) return;
      context.drawImage(frame.bitmap, 0, 0);
      canvas.setAttribute("aria-label", `image ${i + 1}, ${caption}: after step ${frame.row} of ${frame.rows}`);
    });
  }
}
