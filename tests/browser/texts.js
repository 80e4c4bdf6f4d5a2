// All texts that can be seen: their size in CSS pixels, and the contrast of WCAG 2.2 between their
// colour and the nearest opaque background, opacity included.
(() => {
  const numbers = colour => colour.match(/[0-9.]+/g).map(Number);
  const light = part => part <= 0.04045 ? part / 12.92 : ((part + 0.055) / 1.055) ** 2.4;
  const luminance = colour => {
    const [red, green, blue] = colour.map(part => light(part / 255));
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue;
  };
  const ground = element => {
    for (let box = element; box; box = box.parentElement) {
      const colour = numbers(getComputedStyle(box).backgroundColor);
      if (colour.length === 3 || colour[3] === 1) return colour.slice(0, 3);
    }
    return [255, 255, 255];
  };
  const opacity = element => {
    let alpha = 1;
    for (let box = element; box; box = box.parentElement) {
      alpha *= Number(getComputedStyle(box).opacity);
    }
    return alpha;
  };
  const found = [];
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const element = walker.currentNode.parentElement;
    const text = walker.currentNode.data.trim();
    if (!text || !element.checkVisibility() || element.closest('title')) continue;
    const style = getComputedStyle(element), back = ground(element), alpha = opacity(element);
    const ink = numbers(style.color).slice(0, 3);
    const seen = ink.map((part, i) => part * alpha + back[i] * (1 - alpha));
    const [low, high] = [luminance(seen), luminance(back)].sort((a, b) => a - b);
    found.push({text: text.slice(0, 40), size: parseFloat(style.fontSize),
                contrast: (high + 0.05) / (low + 0.05)});
  }
  return found;
})()
