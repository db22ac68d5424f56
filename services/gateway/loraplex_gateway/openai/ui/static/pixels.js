// Blocks so small that no corner of them is seen to be round, as pixels: twenty engines with ten thousand pages each would
// take a third of a second with a path for each block.

export class Pixels {
  constructor() {
    this.image = null;
  }

  // Begins a picture of a canvas's size, empty.
  begin(context) {
    const { width, height } = context.canvas;
    if (this.image?.width !== width || this.image.height !== height) {
      this.image = context.createImageData(width, height);
      this.pixels = new Uint32Array(this.image.data.buffer);
    } else this.pixels.fill(0);
  }

  // Fills a rectangle, in pixels; it has at least one.
  fill(x, y, width, height, color) {
    const [left, top] = [Math.round(x), Math.round(y)];
    const right = Math.max(left + 1, Math.round(x + width));
    const bottom = Math.max(top + 1, Math.round(y + height));
    for (let row = top; row < bottom; row += 1) this.pixels.fill(color, row * this.image.width + left, row * this.image.width + right);
  }

  end(context) {
    context.putImageData(this.image, 0, 0);
  }
}
