// Gradio 6's loading screen goes on asking for the next frame when it is gone, for as long as the page is open, which costs
// a tenth of a processor. Nothing else moves on a page that nobody touches: what is asked for then is this, and it ends.
(() => {
  const touches = ["pointerdown", "keydown", "wheel"];
  let rest;
  const end = () => {
    const newest = requestAnimationFrame(() => {});
    for (let one = newest - 8; one <= newest; one++) cancelAnimationFrame(one);
    for (const kind of touches) removeEventListener(kind, wait, true);
  };
  const wait = () => {
    clearTimeout(rest);
    rest = setTimeout(end, 5000);
  };
  for (const kind of touches) addEventListener(kind, wait, true);
  wait();
})();
