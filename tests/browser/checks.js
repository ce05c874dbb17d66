// What the tests ask of a page: an expression whose value is an object of functions, each of which
// returns what is wrong.
({
  // Controls that a screen reader could not name.
  nameless() {
    const named = (each) => each.getAttribute("aria-label")
      || [...(each.labels ?? [])].some((label) => label.textContent.trim())
      || (!/INPUT|SELECT|TEXTAREA/.test(each.tagName) && each.textContent.trim());
    return [...document.querySelectorAll("input, select, textarea, button, a, summary")]
      .filter((each) => each.checkVisibility() && !named(each))
      .map((each) => each.outerHTML);
  },

  // Texts with less than 4.5 : 1 against what is behind them (WCAG 1.4.3).
  faint() {
    const parse = (color) => {
      const [r, g, b, a = 1] = color.match(/[\d.]+/g).map(Number);
      return { rgb: [r, g, b], a };
    };
    const light = (rgb) => {
      const [r, g, b] = rgb.map((v) => v / 255)
        .map((v) => (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4));
      return 0.2126 * r + 0.7152 * g + 0.0722 * b;
    };
    const behind = (element) => {
      for (let at = element; at; at = at.parentElement) {
        const { rgb, a } = parse(getComputedStyle(at).backgroundColor);
        if (a === 1) return rgb;
      }
      return [255, 255, 255];
    };
    const texts = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
    const faint = [];
    while (texts.nextNode()) {
      const element = texts.currentNode.parentElement;
      const text = texts.currentNode.textContent.trim();
      if (!text || !element.checkVisibility()) continue;
      if (element.closest(".unseen, .skip, noscript, title")) continue;
      const style = getComputedStyle(element);
      const ink = parse(element instanceof SVGElement ? style.fill : style.color).rgb;
      const [low, high] = [light(ink), light(behind(element))].sort((x, y) => x - y);
      const ratio = (high + 0.05) / (low + 0.05);
      if (ratio < 4.5) faint.push(`${ratio.toFixed(2)} ${text.slice(0, 40)}`);
    }
    return faint;
  },

  // Horizontal scrolling, and what makes it necessary.
  tooWide() {
    if (document.documentElement.scrollWidth <= innerWidth) return [];
    return ["page", ...[...document.querySelectorAll("body *")]
      .filter((each) => each.getBoundingClientRect().right > innerWidth + 1)
      .map((each) => each.outerHTML.slice(0, 80))];
  },

  // All events that the console's parser finds in a text, cut into pieces of several sizes.
  async parsed(text) {
    const { events } = await import("/console/stream.js");
    const bytes = new TextEncoder().encode(text);
    const all = [];
    for (const size of [1, 2, 7, bytes.length]) {
      const body = new ReadableStream({
        start(to) {
          for (let at = 0; at < bytes.length; at += size) to.enqueue(bytes.slice(at, at + size));
          to.close();
        },
      });
      const found = [];
      for await (const event of events(body)) found.push(event);
      all.push(found);
    }
    return all;
  },

  // Whether a script could make markup of a string.
  written() {
    try {
      document.body.innerHTML = "<p>x";
      return "written";
    } catch (error) {
      return error.name;
    }
  },
})
