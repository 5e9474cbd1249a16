// Shows the prompts whose text or answers hold every word of the search.
const field = document.getElementById("search");
if (field) {
  const prompts = [...document.querySelectorAll(".prompt")].map((part) => [part, part.textContent.toLowerCase()]);
  field.addEventListener("input", () => {
    const words = field.value.toLowerCase().split(/\s+/).filter(Boolean);
    let shown = 0;
    for (const [part, text] of prompts) {
      part.hidden = !words.every((word) => text.includes(word));
      shown += !part.hidden;
    }
    document.getElementById("count").textContent = shown + " of " + prompts.length + " prompts";
  });
}
